"""Fused pack and unpack: scattered pages of all layers to one run and back, with and without checksums."""

import torch

from benchmarks.gpu import device
from benchmarks.gpu.out import Out
from benchmarks.gpu.slabs import ids
from impala_vllm import ops
from impala_vllm.ops import PageTable

QUESTION = "micro/gpu-pack"
PAGE_BYTES = 32 << 10
"""Of a layer: 16 tokens of 8 KV heads of 128 in bfloat16 are 64 KiB, as two pages of K and V or one."""


def run(out: Out) -> None:
    """Over pinned memory, against the link; within the device, against its own copies."""
    place = device.get()
    is_real = place.type == "cuda"
    num_layers, num_pages = (32, 256) if is_real else (2, 4)
    sizes = [PAGE_BYTES] * num_layers
    pool = [device.device_bytes(4 * num_pages * PAGE_BYTES, place).view(-1, PAGE_BYTES).random_(0, 256) for _ in sizes]
    table = PageTable.of(pool, place)
    at = ids(num_pages, 4 * num_pages, 1).to(place)
    sums = torch.empty(num_pages, dtype=torch.int64, device=place)
    num_bytes = num_pages * sum(sizes)
    facts = out.facts()
    for where, run_of in (
        ("host", device.host_bytes(num_bytes, place)),
        ("device", device.device_bytes(num_bytes, place)),
    ):
        rows = run_of.view(num_pages, -1)
        for name, ceiling, checksums in (
            ("pack", "D2H", None),
            ("pack", "D2H", sums),
            ("unpack", "H2D", None),
            ("unpack", "H2D", sums),
        ):
            if name == "pack":
                taken = device.seconds(lambda r=rows, c=checksums: ops.pack_pages(table, at, r, c), place, 10)
            else:
                taken = device.seconds(lambda r=rows, c=checksums: ops.unpack_pages(r, table, at, c), place, 10)
            variant = f"{name}{' with checksums' if checksums is not None else ''}"
            rates = [num_bytes / s / 1e9 for s in taken]
            rate = out.figure(
                QUESTION,
                variant,
                f"run in {where}",
                "GB/s",
                rates,
                better="higher",
                pages=f"{num_pages} x {num_layers} layers x {PAGE_BYTES >> 10} KiB",
            )
            link = facts.get(ceiling if where == "host" else "device")
            share = f", {rate * 1e9 / link:.2f} of {'the link' if where == 'host' else 'a copy'}" if link else ""
            out.line(f"{variant}, run in {where}: {rate:.1f} GB/s{share}")
