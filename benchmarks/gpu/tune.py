"""Which launch numbers are best here, and from where on the DMA engines win: provenance for `ops/tuning.py`."""

import itertools
import time
from dataclasses import dataclass, replace

from benchmarks.gpu import device
from benchmarks.gpu.movers import Batch, Pages
from benchmarks.gpu.out import Out
from impala_vllm.ops import tuning
from impala_vllm.replay.measures import quantile

QUESTION = "micro/gpu-tune"
KIB = 1 << 10
LIMIT_S = 90.0


@dataclass(frozen=True, slots=True)
class Grid:
    """What is tried."""

    pool_bytes: int
    pages: tuple[int, ...]
    """Page sizes at which launches are tried."""
    programs: tuple[int, ...]
    chunks: tuple[int, ...]
    warps: tuple[int, ...]
    sizes: tuple[int, ...]
    """Page sizes at which DMA is set against the kernel, in batches of `count`."""
    count: int
    few: tuple[int, ...]
    """Batches of pages of the second size."""


REAL = Grid(
    256 << 20,
    (2 * KIB, 16 * KIB, 64 * KIB),
    (4, 8, 12, 16, 24, 32, 64),
    (2 * KIB, 8 * KIB, 16 * KIB),
    (4, 8),
    (4 * KIB, 8 * KIB, 16 * KIB, 24 * KIB, 32 * KIB, 48 * KIB, 64 * KIB),
    1024,
    (1, 4, 8, 16, 32, 64),
)
REHEARSED = Grid(64 * KIB, (2 * KIB,), (4, 8), (2 * KIB,), (4,), (2 * KIB, 4 * KIB), 8, (1, 4))


def run(out: Out) -> None:
    """The thresholds, then the best launch of each direction and page size."""
    place = device.get()
    grid = REAL if place.type == "cuda" else REHEARSED
    with device.own_stream(place):
        pages = Pages.of(grid.pool_bytes, place)
        _thresholds(out, grid, pages)
        _launches(out, grid, pages)


def _thresholds(out: Out, grid: Grid, pages: Pages) -> None:
    """Loads and stores by our kernel as shipped and by vLLM's DMA: by page size, and by how few pages there are."""
    for direction in ("H2D", "D2H"):
        cases = [(size, grid.count) for size in grid.sizes] + [(grid.sizes[1], count) for count in grid.few]
        said: list[str] = []
        for page_bytes, count in cases:
            batch = pages.batch(direction, page_bytes, count)
            try:
                rates = {name: _rate(batch, name) for name in ("impala", "vllm_dma")}
            except (ImportError, AttributeError, RuntimeError) as e:
                out.line(f"no threshold: {type(e).__name__}: {str(e)[:160]}")
                return
            where = f"{direction}, {page_bytes // KIB} KiB x {count}"
            for name, rate in rates.items():
                out.figure(QUESTION, name, where, "GB/s", [rate / 1e9], better="higher")
            said.append(f"{page_bytes // KIB} KiB x {count} {rates['vllm_dma'] / rates['impala']:.2f}")
        out.line(f"{direction}, DMA / kernel: {', '.join(said)}")


def _launches(out: Out, grid: Grid, pages: Pages) -> None:
    """The best launch, and the fewest programs within 3 % of it."""
    shipped, deadline = tuning.SWAP, time.monotonic() + LIMIT_S
    try:
        for direction, page_bytes in itertools.product(("H2D", "D2H"), grid.pages):
            batch = pages.batch(direction, page_bytes, min(4096, grid.pool_bytes // page_bytes // 2))
            rates: dict[tuple[int, int, int], float] = {}
            for programs, chunk, warps in itertools.product(grid.programs, grid.chunks, grid.warps):
                if time.monotonic() > deadline:
                    out.line(f"{direction} {page_bytes // KIB} KiB and what follows: left out, no time")
                    return
                tuning.SWAP = replace(shipped, num_programs=programs, chunk_bytes=chunk, num_warps=warps)
                rates[programs, chunk, warps] = _rate(batch, "impala")
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


def _rate(batch: Batch, name: str) -> float:
    """Median bytes a second of a mover."""
    taken = device.seconds(getattr(batch, name)(), batch.place, 5, warm_up=1)
    return batch.num_bytes / quantile(taken, 0.5)
