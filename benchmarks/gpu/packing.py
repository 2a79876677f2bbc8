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
    num_layers, num_pages, page_bytes = (32, 256, PAGE_BYTES) if is_real else (2, 2, 2048)
    sizes = [page_bytes] * num_layers
    pool = [device.device_bytes(4 * num_pages * page_bytes, place).view(-1, page_bytes).random_(0, 256) for _ in sizes]
    table = PageTable.of(pool, place)
    at = ids(num_pages, 4 * num_pages, 1).to(place)
    sums = torch.empty(num_pages, dtype=torch.int64, device=place)
    num_bytes = num_pages * sum(sizes)
    facts = out.facts()
    _fp8(out, table, pool, at, facts)
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
                pages=f"{num_pages} x {num_layers} layers x {page_bytes >> 10} KiB",
            )
            link = facts.get(ceiling if where == "host" else "device")
            share = f", {rate * 1e9 / link:.2f} of {'the link' if where == 'host' else 'a copy'}" if link else ""
            out.line(f"{variant}, run in {where}: {rate:.1f} GB/s{share}")


def _fp8(out: Out, table: PageTable, pool: list[torch.Tensor], at: torch.Tensor, facts: dict[str, float]) -> None:
    """Rates count the pages' bytes, not the run's: what matters is how soon the pages are gone."""
    place = table.device
    for layer in pool:
        layer.view(torch.bfloat16).normal_()
    run_of = device.host_bytes(len(at) * ops.demoted_bytes(table), place).view(len(at), -1)
    runs, order = PageTable.of([run_of], place), torch.arange(len(at), device=place)
    num_bytes = len(at) * table.run_bytes
    moves = {
        "demote": ("D2H", lambda: ops.demote_pages(table, at, runs, order)),
        "promote": ("H2D", lambda: ops.promote_pages(runs, order, table, at)),
    }
    for name, (ceiling, move) in moves.items():
        rates = [num_bytes / s / 1e9 for s in device.seconds(move, place, 10)]
        rate = out.figure(QUESTION, name, "run in host", "GB/s of pages", rates, better="higher")
        share = f", {rate * 1e9 / 2 / facts[ceiling]:.2f} of the link" if facts.get(ceiling) else ""
        out.line(f"{name}, run in host: {rate:.1f} GB/s of pages{share}")
