"""Bandwidth of batches of pages over the link, by page size and batch: our kernels, vLLM's own swap, the ceiling."""

import time

import torch

from benchmarks.gpu import device
from benchmarks.gpu.movers import Batch, Move, Pages
from benchmarks.gpu.out import Out

QUESTION = "micro/gpu-swap"
KIB = 1 << 10
PAGES = (2 * KIB, 8 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 2048 * KIB)
BATCHES = (1, 16, 256, 4096)
MOST_BYTES = 1 << 30
"""Larger batches are as fast as this one and take longer."""
LIMIT_S = 60.0
MOVERS = ("vllm", "vllm_dma", "impala", "courier", "impala_ranges", "torch_copies")
"""vLLM first: it loads the library whose DMA the courier takes where it can."""
MAY_BE_MISSING = ("vllm", "vllm_dma", "torch_copies")
"""Left out with a line where they do not work; one of ours that does not fails the step."""
MOST_TORCH_COPIES = 256
LARGE_BYTES = 16 * KIB
"""From here on the bar is the link; below, vLLM's swap."""


def run(out: Out) -> None:
    """Every direction, page size and batch; what time does not allow is named. Raises ValueError for a mover that
    brings other bytes."""
    place = device.get()
    with device.own_stream(place):
        _run(out, place)


def _run(out: Out, place: torch.device) -> None:
    is_real = place.type == "cuda"
    pages = Pages.of(MOST_BYTES if is_real else 1 << 20, place)
    deadline = time.monotonic() + LIMIT_S
    missing: set[str] = set()
    for direction in ("H2D", "D2H"):
        for page_bytes in PAGES if is_real else PAGES[:2]:
            said: list[str] = []
            for count in BATCHES if is_real else BATCHES[:2]:
                if page_bytes * count > pages.host.numel():
                    said.append(f"{count}: more than {pages.host.numel() >> 20} MiB, left out")
                    continue
                if time.monotonic() > deadline:
                    out.line(f"{direction}, pages of {page_bytes // KIB} KiB and what follows: left out, no time")
                    return
                rates = _measure(out, pages.batch(direction, page_bytes, count), missing)
                best = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in rates.items())
                said.append(f"{count}: {best}")
            out.line(f"{direction} {page_bytes // KIB} KiB, GB/s by batch: {'; '.join(said)}")


def _measure(out: Out, batch: Batch, missing: set[str]) -> dict[str, float]:
    """Median bytes a second of each mover that works here."""
    rates: dict[str, float] = {}
    link = out.facts().get(batch.direction)
    page_bytes, count = batch.source.shape[1], len(batch.source_ids)
    for name in MOVERS:
        if name in missing or (name == "torch_copies" and count > MOST_TORCH_COPIES):
            continue
        try:
            move: Move = getattr(batch, name)()
            is_right = batch.is_right(move)
            taken = device.seconds(move, batch.place, 7)
        except (ImportError, AttributeError, RuntimeError, AssertionError) as e:
            if name not in MAY_BE_MISSING:
                raise
            missing.add(name)
            out.line(f"{name} left out ({type(e).__name__}: {str(e).splitlines()[0][:160] if str(e) else ''})")
            continue
        where = f"{batch.direction}, {page_bytes // KIB} KiB x {count}"
        if not is_right:
            raise ValueError(f"{name} moves other bytes: {where}")
        rate = out.figure(
            QUESTION, name, where, "GB/s", [batch.num_bytes / s / 1e9 for s in taken], better="higher"
        )  # fmt: skip
        rates[name] = rate * 1e9
        if link and batch.num_bytes >= 16 << 20:
            share = [batch.num_bytes / s / link for s in taken]
            out.figure(QUESTION, name, f"share of link, {where}", "", share, better="higher")
    if page_bytes < LARGE_BYTES and {"vllm", "courier"} <= rates.keys():
        where = f"{batch.direction}, {page_bytes // KIB} KiB x {count}"
        out.figure(QUESTION, "courier", f"to vLLM's, {where}", "", [rates["courier"] / rates["vllm"]], better="higher")
    return rates
