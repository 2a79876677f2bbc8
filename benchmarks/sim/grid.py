"""The points of the study: a workload, an oversubscription of HBM, tiers below it and their links.

The grid of an hour has every load, tier, link and workload, and 21 of the 35 combinations a workload. Left out is what
lies between HBM alone and everything below it where HBM holds most of what is live (0.5x to 2x; host 4x holds all of it
twice there), and slow links where little moves over them (below 4x).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msgspec import structs

from impala_vllm.sim.sessions import Workload
from impala_vllm.sim.simulation import Arrivals, Setup
from impala_vllm.sim.timing import Timing

LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0)
QUICK_LEVELS = (1.0, 4.0)
BOTH = "host 1x, NVMe 8x"
TIERS = {"HBM": (0.0, 0.0), "host 1x": (1.0, 0.0), "host 4x": (4.0, 0.0), BOTH: (1.0, 8.0)}
LINKS = {"GPU links": 1.0, "slow links": 1 / 3}
"""Rates, as a share of the timing's: host at some 12 and 4 times, NVMe at 1.5 and 0.5 times the rate of prefill."""
GPU_LINKS, SLOW_LINKS = LINKS

_HOUR = {
    1.0: (("HBM", GPU_LINKS), (BOTH, GPU_LINKS)),
    2.0: (("HBM", GPU_LINKS), ("host 1x", GPU_LINKS), (BOTH, GPU_LINKS)),
}
"""Up to these levels; above them everything."""
_QUICK = (("HBM", GPU_LINKS), ("host 1x", GPU_LINKS), (BOTH, GPU_LINKS))
_ALL = tuple((t, link) for t in TIERS for link in LINKS if (t, link) != ("HBM", SLOW_LINKS))

GRIDS = ("hour", "full", "quick")


@dataclass(frozen=True, slots=True)
class Point:
    workload: str
    level: float
    """That is asked for: HBM holds the longest turn at least."""
    tiers: str
    links: str

    def __str__(self) -> str:
        links = "" if self.tiers == "HBM" else f", {self.links}"
        return f"{self.workload} {self.level:g}x, {self.tiers}{links}"


def points(grid: str, workloads: Sequence[str], levels: Sequence[float] = ()) -> list[Point]:
    """One of `GRIDS`; its own levels unless some are given."""
    levels = levels or (QUICK_LEVELS if grid == "quick" else LEVELS)
    return [Point(w, level, t, link) for w in workloads for level in levels for t, link in _below(grid, level)]


def setup(load: Workload, engine: Timing, point: Point) -> Setup:
    """HBM for the working set over the level, and the tiers for their share of it."""
    hbm = max(round(load.working_set_tokens() / point.level), load.longest_tokens() + 2 * load.block_size)
    host, nvme = TIERS[point.tiers]
    share = LINKS[point.links]
    rates = ("host_bytes_per_s", "nvme_read_bytes_per_s", "nvme_write_bytes_per_s")
    slowed = {n: share * rate for n in rates if (rate := getattr(engine, n)) is not None}
    slow = structs.replace(engine, **slowed)
    return Setup(slow, hbm, host_tokens=round(host * hbm), nvme_tokens=round(nvme * hbm), arrivals=Arrivals())


def _below(grid: str, level: float) -> Iterator[tuple[str, str]]:
    if grid == "quick":
        yield from _QUICK
    elif grid == "full":
        yield from _ALL
    else:
        yield from next((some for most, some in _HOUR.items() if level <= most), _ALL)
