"""Simulated against vLLM's own scheduler in virtual time, on the same plan: how far off is each arm?

The same steps cost the same on both sides, so what differs is how the simulator schedules, caches and tells policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.sim.lowered import workload
from benchmarks.virtual.bench import BLOCK_SIZE, Bench
from impala_vllm.replay.arms import ARMS, Room
from impala_vllm.replay.measures import mean
from impala_vllm.replay.plan import Plan
from impala_vllm.sim import timing
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.simulation import Arrivals, Setup, run

COUNTERPARTS = {"stock": "stock", "impala": "impala-enforce", "unbounded": "unbounded"}
"""Policies of the simulator, and the arms of a replay that are the same."""
WITH_HOST = {"stock": "stock-lru", "impala": "impala-host", "unbounded": "unbounded"}
WITH_NVME = {"stock": "stock-lru-fs", "impala": "impala-tiers", "unbounded": "unbounded"}
"""vLLM's fs tier has no limit, the simulator's has one that the working set fits."""

TOLERANCE = 0.15
"""Off by at most this share, over the mean of all seeds."""
NOTHING = 0.01
"""Hit ratios this close are alike, however small they are."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One plan on one arm, in both worlds."""

    policy: str
    stall_s: float
    virtual_stall_s: float
    hit_ratio: float
    virtual_hit_ratio: float

    @property
    def hits(self) -> float:
        """One over the other; 1 where both are as good as nothing."""
        if abs(self.hit_ratio - self.virtual_hit_ratio) <= NOTHING:
            return 1.0
        return self.hit_ratio / max(NOTHING, self.virtual_hit_ratio)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Means over all seeds, simulated over virtual."""

    policy: str
    stall: float
    hit_ratio: float
    is_close: bool


def counterparts(host_share: float, nvme_share: float) -> dict[str, str]:
    """Arms by policy, with tiers of these shares of HBM."""
    return WITH_NVME if nvme_share else WITH_HOST if host_share else COUNTERPARTS


def compare(bench: Bench, plan: Plan, level: float, host_share: float = 0.0, nvme_share: float = 0.0) -> list[Pair]:
    """All arms on one plan, HBM for its working set over `level`, tiers of so many times HBM; links as the timing's."""
    load = workload(plan, BLOCK_SIZE, bench.vocabulary)
    least = load.longest_tokens() // BLOCK_SIZE + 2
    num_blocks = max(least, round(plan.working_set_tokens() / level / BLOCK_SIZE))
    # vLLM keeps one block of its pool to itself; tasks start within 5 s, as a replay's do.
    engine = timing.load(bench.timing.name)
    setup = Setup(
        engine,
        (num_blocks - 1) * BLOCK_SIZE,
        host_tokens=round(host_share * num_blocks) * BLOCK_SIZE,
        nvme_tokens=round(nvme_share * num_blocks) * BLOCK_SIZE,
        arrivals=Arrivals(spread_s=5.0),
    )
    if host_share:
        assert engine.host_bytes_per_s is not None
        assert engine.nvme_read_bytes_per_s is not None
        rates = engine.host_bytes_per_s, engine.nvme_read_bytes_per_s
        room = Room(host_share, nvme_share, *(rate / engine.kv_bytes_per_token for rate in rates))
        bench = replace(bench, room=room)
    pairs: list[Pair] = []
    for policy, arm in counterparts(host_share, nvme_share).items():
        simulated = run(load, setup, KINDS[policy]).measures
        virtual = bench.replay(plan, ARMS[arm], num_blocks)
        pairs.append(
            Pair(policy, simulated.stall_mean_s, virtual.stall_mean_s, simulated.hit_ratio, virtual.cached_share)
        )
    return pairs


def verdicts(pairs: Sequence[Pair]) -> list[Verdict]:
    """By policy."""
    return [_verdict(policy, [p for p in pairs if p.policy == policy]) for policy in COUNTERPARTS]


def same_ranking(pairs: Sequence[Pair]) -> bool:
    """Do both worlds order the arms alike, by mean stall?"""

    def order(stall: str) -> list[str]:
        by_policy = {n: mean([getattr(p, stall) for p in pairs if p.policy == n]) for n in COUNTERPARTS}
        return sorted(by_policy, key=by_policy.__getitem__)

    return order("stall_s") == order("virtual_stall_s")


def _verdict(policy: str, pairs: list[Pair]) -> Verdict:
    stall = mean([p.stall_s for p in pairs]) / mean([p.virtual_stall_s for p in pairs])
    hits, virtual = mean([p.hit_ratio for p in pairs]), mean([p.virtual_hit_ratio for p in pairs])
    hit_ratio = hits / virtual if virtual else 1.0
    hits_alike = abs(hit_ratio - 1) <= TOLERANCE or abs(hits - virtual) <= NOTHING
    return Verdict(policy, stall, hit_ratio, abs(stall - 1) <= TOLERANCE and hits_alike)
