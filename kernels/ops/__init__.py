"""Copies of KV pages on a GPU: the same functions by Triton and by torch, exact to the bit.

`PageTable` says where pages lie; `swap_pages`, `gather_pages` and `scatter_pages` move them, `pack_pages` and
`unpack_pages` turn them into one run and back, `copy_ranges` takes bare addresses.
"""

from impala_vllm.ops.dispatch import (
    copy_ranges,
    gather_pages,
    has_triton,
    pack_pages,
    scatter_pages,
    swap_pages,
    unpack_pages,
)
from impala_vllm.ops.pages import PageTable

__all__ = [
    "PageTable",
    "copy_ranges",
    "gather_pages",
    "has_triton",
    "pack_pages",
    "scatter_pages",
    "swap_pages",
    "unpack_pages",
]
