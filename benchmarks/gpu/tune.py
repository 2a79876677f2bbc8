"""Which launch numbers are best here: programs, chunk and warps of the swap, for the provenance in `ops/tuning.py`."""

import itertools
import time
from dataclasses import replace

from benchmarks.gpu import device
from benchmarks.gpu.movers import Pages
from benchmarks.gpu.out import Out
from impala_vllm.ops import tuning
from impala_vllm.replay.measures import quantile

QUESTION = "micro/gpu-tune"
KIB = 1 << 10
PROGRAMS = (4, 8, 12, 16, 24, 32, 64)
CHUNKS = (2 * KIB, 8 * KIB, 16 * KIB)
WARPS = (4, 8)
LIMIT_S = 90.0


def run(out: Out) -> None:
    """The best launch of each direction and page size, and the fewest programs within 3 % of it."""
    place = device.get()
    pages = Pages.of(256 << 20, place)
    shipped, deadline = tuning.SWAP, time.monotonic() + LIMIT_S
    try:
        for direction, page_bytes in itertools.product(("H2D", "D2H"), (2 * KIB, 16 * KIB, 64 * KIB)):
            batch = pages.batch(direction, page_bytes, 4096 if page_bytes * 4096 <= 256 << 20 else 2048)
            rates: dict[tuple[int, int, int], float] = {}
            for programs, chunk, warps in itertools.product(PROGRAMS, CHUNKS, WARPS):
                if time.monotonic() > deadline:
                    out.line(f"{direction} {page_bytes // KIB} KiB and what follows: left out, no time")
                    return
                tuning.SWAP = replace(shipped, num_programs=programs, chunk_bytes=chunk, num_warps=warps)
                taken = device.seconds(batch.impala(), place, 5, warm_up=1)
                rates[programs, chunk, warps] = batch.num_bytes / quantile(taken, 0.5)
            best = max(rates.values())
            near = min(k for k, rate in rates.items() if rate >= 0.97 * best)
            for launch in {max(rates, key=lambda k: rates[k]), near}:
                programs, chunk, warps = launch
                out.figure(
                    QUESTION,
                    f"{programs} programs, {chunk // KIB} KiB, {warps} warps",
                    f"{direction}, {page_bytes // KIB} KiB",
                    "GB/s",
                    [rates[launch] / 1e9],
                    better="higher",
                )
            out.line(
                f"{direction} {page_bytes // KIB} KiB: best {best / 1e9:.1f} GB/s; fewest programs within 3 %: "
                f"{near[0]} of {near[1] // KIB} KiB with {near[2]} warps, {rates[near] / 1e9:.1f} GB/s"
            )
    finally:
        tuning.SWAP = shipped
