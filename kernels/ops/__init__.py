"""Copies of KV pages on a GPU: the same functions by Triton and by torch, exact to the bit.

`PageTable` says where pages lie; `swap_pages`, `gather_pages` and `scatter_pages` move them, `pack_pages` and
`unpack_pages` turn them into one run and back, `copy_ranges` takes bare addresses; `demote_pages` and
`promote_pages` pack to half the bytes, at a loss. A `Courier` carries batches of a `Pool`'s pages to the host and back,
on streams of its own, in a safe order.
"""

from impala_vllm.ops.courier import Batch, Courier, Pool, Ticket, Way, ways
from impala_vllm.ops.dispatch import (
    copy_ranges,
    demote_pages,
    gather_pages,
    has_triton,
    pack_pages,
    promote_pages,
    scatter_pages,
    swap_pages,
    unpack_pages,
)
from impala_vllm.ops.naive import demoted_bytes, most_demoted_bytes
from impala_vllm.ops.pages import PageTable

__all__ = [
    "Batch",
    "Courier",
    "PageTable",
    "Pool",
    "Ticket",
    "Way",
    "copy_ranges",
    "demote_pages",
    "demoted_bytes",
    "gather_pages",
    "has_triton",
    "most_demoted_bytes",
    "pack_pages",
    "promote_pages",
    "scatter_pages",
    "swap_pages",
    "unpack_pages",
    "ways",
]
