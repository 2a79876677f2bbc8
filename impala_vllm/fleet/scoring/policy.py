"""One price for every replica, in seconds: prefill, transfer, queue, harm; the cheapest serves.

    prefill   what is not in reach, at the measured rate
    transfer  what lies in host, on NVMe or beyond, where loading it is cheaper than computing it
    queue     prefill sent there before that has not answered, and a little for each request that runs
    harm      what computing it there costs others: they wait, and KV that will be wanted again makes room
    crowd     for a new trace: those that live there, silent in tool gaps, come back and want the server too
    credit    of a stem that many traces share and too few replicas hold, to those that would be one more

A trace stays where it is unless that is clearly dearer: costs that are alike must not make it wander. The terms follow
Preble (https://arxiv.org/abs/2407.00023) and Dynamo's router; prices in seconds, and tiers, are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import NamedTuple

from impala_vllm.core.cost import StepCost
from impala_vllm.fleet.index import Depths
from impala_vllm.fleet.places import Replica
from impala_vllm.fleet.scoring.load import Load


@dataclass(frozen=True, slots=True)
class ScoringConfig:
    """Priors and margins; rates are measured."""

    host_speedup: float = 12.0
    """Loading from host against computing. What PCIe gives an 8B model; a prior that engines refine themselves."""
    nvme_speedup: float = 2.0
    remote_speedup: float = 1.5
    running_s: float = 0.02
    """What each running request delays a newcomer: about a decode step."""
    stay_ratio: float = 1.25
    """A trace moves only where the price of staying is above that of going by this factor,"""
    stay_s: float = 0.1
    """and by this much."""
    delays_others: float = 0.5
    """Of each second of prefill: those who come after wait for it too. Makes waiting for a stem that is being computed
    cheaper than computing it again elsewhere."""
    neighbour_tokens: int = 2048
    """Of prefill that each trace which lives there is expected to want of it while a new one settles. More waits less
    for stems that are being computed, fewer leaves load as uneven as without."""
    safe_pressure: float = 0.5
    """Live KV as a share of HBM up to which new blocks evict only dead ones."""


class Question(NamedTuple):
    """A turn that wants a place."""

    num_tokens: int
    block_tokens: int
    depths: Mapping[Replica, Depths] | None
    """Blocks of it that each replica holds; None: its hashes are not known."""
    home: Replica | None = None
    """Where its trace was served last."""
    num_sharing: int = 1
    """Live traces that open as this one does,"""
    num_traces: int = 1
    """of so many in all."""
    settles: bool = True
    """Without a home: its trace is new, as far as can be told."""


class Terms(NamedTuple):
    """The parts of a price."""

    prefill_s: float
    transfer_s: float
    queue_s: float
    harm_s: float
    crowd_s: float
    credit_s: float

    @property
    def total_s(self) -> float:
        """What is compared."""
        return self.prefill_s + self.transfer_s + self.queue_s + self.harm_s + self.crowd_s - self.credit_s


class Reason(Enum):
    """Why there."""

    HOME = "home"
    """Its trace is there, and staying is not clearly dearer."""
    SPILL = "spill"
    """Its trace is elsewhere, but waiting there costs more than beginning anew here."""
    PREFIX = "prefix"
    """It has most of the prompt, all told."""
    REPLICATE = "replicate"
    """A stem in demand gets one replica more."""
    LOAD = "load"
    """Nobody has anything of it: the least busy."""
    BLIND = "blind"
    """Nothing is known of the prompt: the less busy of two drawn by lot."""


class Decision(NamedTuple):
    """Where to, why, and at what price."""

    replica: Replica
    reason: Reason
    total_s: float
    cached_tokens: int
    """Of the prompt, expected to be in the replica's reach."""


class Policy:
    """Decides; keeps nothing but the measured cost of prefill. The same question, loads and lots: the same answer."""

    def __init__(self, config: ScoringConfig | None = None, cost: StepCost | None = None) -> None:
        self.config = config or ScoringConfig()
        self.cost = cost or StepCost()

    def choose(self, question: Question, loads: Mapping[Replica, Load], lot: Random) -> Decision | None:
        """The place; None where no replica is open. O(replicas)."""
        candidates = [(replica, load) for replica, load in loads.items() if load.is_open]
        if not candidates:
            return None
        home = question.home if question.home is not None and loads.get(question.home) is not None else None
        if question.depths is None and home is None:
            return self._blind(candidates, lot)
        depths = question.depths or {}
        nowhere_s = self.cost.prefill_s(question.num_tokens)
        credit_s = self._credit(question, loads)
        nowhere = (nowhere_s, nowhere_s - credit_s)
        running_s, share = self.config.running_s, self.config.delays_others
        neighbour_s = self._neighbour_s(question, nowhere_s)
        reached: dict[Depths, tuple[float, float]] = {}
        best: Replica | None = None
        best_s, home_s = float("inf"), None
        for replica, load in candidates:
            depth = depths.get(replica)
            if depth is None or not depth.remote:
                fresh_s, price_s = nowhere
            elif depth in reached:  # most replicas hold the same stem and no more
                fresh_s, price_s = reached[depth]
            else:
                fresh_s, transfer_s = self._reach(question, depth)
                price_s = fresh_s + transfer_s
                reached[depth] = fresh_s, price_s
            num_running, pending_s, _, num_traces = load.elsewhere
            price_s += load.pending_s + pending_s + (load.num_running + num_running) * running_s
            price_s += (load.num_traces + num_traces) * neighbour_s
            price_s += fresh_s * share if load.capacity_tokens is None else self._harm_s(load, fresh_s)
            if price_s < best_s or (
                price_s == best_s and best is not None and self._goes_first(load, loads[best], lot)
            ):
                best, best_s = replica, price_s
            if replica is home or replica == home:
                home_s = price_s
        assert best is not None
        chosen, total_s = best, best_s
        if home is not None and home_s is not None:
            stays = home_s <= best_s * self.config.stay_ratio or home_s <= best_s + self.config.stay_s
            if stays:
                chosen, total_s = home, home_s
        found = depths.get(chosen)
        cached = min(found.remote * question.block_tokens, question.num_tokens) if found is not None else 0
        return Decision(chosen, self._reason(question, chosen, home, cached, depths, credit_s), total_s, cached)

    def explain(self, question: Question, loads: Mapping[Replica, Load]) -> dict[Replica, Terms]:
        """Each term of each open replica's price."""
        depths = question.depths or {}
        nowhere_s = self.cost.prefill_s(question.num_tokens)
        credit_s = self._credit(question, loads)
        neighbour_s = self._neighbour_s(question, nowhere_s)
        found: dict[Replica, Terms] = {}
        for replica, load in loads.items():
            if not load.is_open:
                continue
            depth = depths.get(replica)
            if depth is None or not depth.remote:
                fresh_s, transfer_s, credited_s = nowhere_s, 0.0, credit_s
            else:
                fresh_s, transfer_s = self._reach(question, depth)
                credited_s = 0.0
            queue_s = self._queue_s(load)
            crowd_s = (load.num_traces + load.elsewhere.num_traces) * neighbour_s
            found[replica] = Terms(fresh_s, transfer_s, queue_s, self._harm_s(load, fresh_s), crowd_s, credited_s)
        return found

    def _reach(self, question: Question, depth: Depths) -> tuple[float, float]:
        """Prefill and transfer, loading from as far down as it pays."""
        config, tokens, size = self.config, question.num_tokens, question.block_tokens
        prefill_s = self.cost.prefill_s
        near = min(depth.hbm * size, tokens)
        best = (prefill_s(tokens, near), 0.0)
        if depth.remote == depth.hbm:
            return best
        transfer_s = 0.0
        speedups = (config.host_speedup, config.nvme_speedup, config.remote_speedup)
        for blocks, speedup in zip(depth[1:], speedups, strict=True):
            far = min(blocks * size, tokens)
            if far > near:
                transfer_s += prefill_s(far, near) / speedup
                near = far
                fresh_s = prefill_s(tokens, far)
                if fresh_s + transfer_s < sum(best):
                    best = (fresh_s, transfer_s)
        return best

    def _harm_s(self, load: Load, fresh_s: float) -> float:
        """Others wait, and what is evicted costs as much as was computed, where live KV fills HBM."""
        share = self.config.delays_others
        if load.capacity_tokens:
            safe = self.config.safe_pressure
            pressure = (load.live_tokens + load.elsewhere.live_tokens) / load.capacity_tokens
            if pressure > safe:
                share += min(1.0, (pressure - safe) / (1.0 - safe))
        return fresh_s * share

    def _neighbour_s(self, question: Question, nowhere_s: float) -> float:
        """What each live trace of a replica adds; nothing to a trace that has a home: it would wander."""
        if question.home is not None or not question.settles:
            return 0.0
        return self.config.neighbour_tokens * nowhere_s / max(1, question.num_tokens)

    def _credit(self, question: Question, loads: Mapping[Replica, Load]) -> float:
        """What replicas without the opening are credited.

        A new trace is the occasion; the stem's share of all traces is the share of replicas that should hold it.
        """
        depths = question.depths
        if not depths or question.home is not None or question.num_sharing < 2:
            return 0.0
        wanted = -(-len(loads) * question.num_sharing // max(question.num_sharing, question.num_traces))
        if len(depths) >= wanted:
            return 0.0
        shared = max(depth.remote for depth in depths.values()) * question.block_tokens
        saved_s = self.cost.prefill_s(min(shared, question.num_tokens)) * (1.0 + self.config.delays_others)
        return saved_s * (1.0 - len(depths) / wanted)

    def _blind(self, candidates: list[tuple[Replica, Load]], lot: Random) -> Decision:
        """Two choices: nearly as even as asking all, and routers that know as little do not herd."""
        drawn = candidates if len(candidates) <= 2 else lot.sample(candidates, 2)
        replica, load = min(drawn, key=lambda c: self._queue_s(c[1]))
        return Decision(replica, Reason.BLIND, self._queue_s(load), 0)

    def _queue_s(self, load: Load) -> float:
        num_running, pending_s, _, _ = load.elsewhere
        return load.pending_s + pending_s + (load.num_running + num_running) * self.config.running_s

    @staticmethod
    def _goes_first(load: Load, other: Load, lot: Random) -> bool:
        """Between equals: the one with less to keep, then by lot, so that several routers do not herd."""
        tokens = load.live_tokens + load.elsewhere.live_tokens
        others = other.live_tokens + other.elsewhere.live_tokens
        if tokens != others:
            return tokens < others
        return lot.random() < 0.5

    @staticmethod
    def _reason(
        question: Question,
        chosen: Replica,
        home: Replica | None,
        cached: int,
        depths: Mapping[Replica, Depths],
        credit_s: float,
    ) -> Reason:
        if chosen == home:
            return Reason.HOME
        if question.home is not None:
            return Reason.SPILL
        if cached:
            return Reason.PREFIX
        return Reason.REPLICATE if credit_s > 0.0 and depths else Reason.LOAD
