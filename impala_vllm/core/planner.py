"""What the tiers below HBM are for, in one price: the seconds it costs to get a trace's KV back.

The same price says what is worth keeping in a tier, what is written to NVMe, and what is loaded rather than computed
again. Every rate in it is measured. Decides only; `core.allocator` and `core.chains` hold the state, adapters move the
bytes.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from impala_vllm.core.cost import StepCost
from impala_vllm.core.first_turns import FirstTurns
from impala_vllm.core.link import Link, LinkConfig
from impala_vllm.core.retention import SOONEST_S
from impala_vllm.core.types import Outcome

_SAYS_NOTHING = (Outcome.LENGTH, Outcome.UNKNOWN)
"""Ends that tell nothing of a next turn."""


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """Switches for comparison, priors, safety margins."""

    gate_writes: bool = True
    """Write to NVMe only what will probably be asked for again; off: everything."""
    choose_loads: bool = True
    """Compute again what a slow disk would keep all who wait longer for; off: load whatever a tier has."""
    host_bytes_per_s: float = 8e9
    """Prior of the link between host and HBM."""
    nvme_bytes_per_s: float = 1e9
    """Prior of NVMe reads."""
    min_second_chance: float = 0.1
    """A first turn's KV is not written to NVMe where a second turn is less likely than this: one-shots. So at most ten
    bytes are written for one that is wanted. One chat in three went on (mooncake): with 0.5 none was written."""


@dataclass(frozen=True, slots=True)
class Below:
    """Tokens of a trace's KV that tiers below HBM hold, from the root on."""

    host_tokens: int = 0
    """Leading tokens in host."""
    nvme_tokens: int = 0
    """Tokens behind those that NVMe has."""
    backed_tokens: int = 0
    """Leading tokens that NVMe has, whatever host holds."""


NOTHING = Below()


class Queue(NamedTuple):
    """The queue around one turn."""

    compute_s: float = 0.0
    """Asked for by the turns before it."""
    nvme_tokens: int = 0
    """To be read from NVMe for them."""
    num_behind: int = 0
    """Turns that its computing keeps waiting: those that run, and those behind it that wait for no read."""
    num_reading_behind: int = 0
    """Turns behind it that NVMe is read for: its own read keeps them waiting."""
    coming_tokens: int = 0
    """Of its own, on their way from NVMe: they cost nothing any more."""


NOBODY = Queue()
"""Nobody else wants anything."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a turn gets the KV that HBM lacks."""

    host_tokens: int
    nvme_tokens: int
    seconds: float
    """Until its last prompt token could be computed, loads and recompute included."""
    price_s: float
    """The same, and what others wait longer for it."""


class Planner:
    """Prices and decisions. Shares step cost with rank, admission and retention."""

    def __init__(self, cost: StepCost, bytes_per_token: float, config: PlannerConfig) -> None:
        self.config = config
        self.host = Link(LinkConfig(config.host_bytes_per_s))
        self.nvme = Link(LinkConfig(config.nvme_bytes_per_s))
        self._cost = cost
        self._bytes_per_token = bytes_per_token
        self._first_turns = FirstTurns()

    def load_s(self, host_tokens: int, nvme_tokens: int) -> float:
        """To bring so many tokens' KV into HBM, with nothing else on the links."""
        through_host = (host_tokens + nvme_tokens) * self._bytes_per_token
        return self.host.seconds(int(through_host)) + self.nvme.seconds(int(nvme_tokens * self._bytes_per_token))

    def back_s(self, num_tokens: int, below: Below = NOTHING) -> float:
        """What it costs to have `num_tokens` in HBM again, the cheaper way for each tier's part."""
        best = self._cost.prefill_s(num_tokens)
        host = min(below.host_tokens, num_tokens)
        nvme = min(below.nvme_tokens, num_tokens - host)
        if host:
            best = min(best, self.load_s(host, 0) + self._cost.prefill_s(num_tokens, host))
        if nvme:
            best = min(best, self.load_s(host, nvme) + self._cost.prefill_s(num_tokens, host + nvme))
        return best

    def host_pays(self) -> bool:
        """Is a load from host quicker than computing the same tokens?"""
        tokens = 1024
        return not self.config.choose_loads or self.load_s(tokens, 0) < self._cost.prefill_s(tokens)

    def nvme_pays(self) -> bool:
        """Does the disk bring tokens quicker than the engine computes them, as a rule?"""
        tokens = 1024
        return self.load_s(0, tokens) < self._cost.prefill_s(tokens)

    def worth_in_host(self, num_tokens: int, below: Below, wait_s: float | None, is_waiting: bool) -> float:
        """Seconds saved per token and second of waiting by having the KV in host rather than below it."""
        without = Below(0, below.backed_tokens)
        saved_s = self.back_s(num_tokens, without) - self.load_s(num_tokens, 0)
        return _per_wait(saved_s / max(1, num_tokens), wait_s, is_waiting)

    def worth_in_nvme(self, num_tokens: int, wait_s: float | None, is_waiting: bool) -> float:
        """The same for NVMe, below which there is nothing: seconds of the engine, beside which the disk reads.

        So it is worth something on a disk that is slower than the engine, too, and what is silent gives way there.
        """
        return _per_wait(self._cost.prefill_s(num_tokens) / max(1, num_tokens), wait_s, is_waiting)

    def writes(self, num_turns: int, kind: Hashable) -> bool | None:
        """Does the KV of a trace's `num_turns`-th turn belong on NVMe, as it is computed?

        None: it is a first one, and of its kind too few are known to tell. Its own end will, at the latest.
        """
        if num_turns > 1 or not self.config.gate_writes:
            return True
        chance = self._first_turns.chance(kind)
        return None if chance is None else chance >= self.config.min_second_chance

    def ended(self, num_turns: int, kind: Hashable, outcome: Outcome, writes: bool, now: float) -> bool:
        """The same at the turn's end, which says more: `writes` was the answer before.

        Where nothing is known of the kind, and the turn did not say how it ended, nothing speaks against it either.
        """
        asks = outcome is Outcome.TOOL_CALL
        if num_turns == 1 and outcome in (Outcome.STOP, Outcome.TOOL_CALL):
            self._first_turns.saw(kind, asks)
        elif num_turns == 1 and outcome in _SAYS_NOTHING:
            self._first_turns.said_nothing(kind, now)
        self._first_turns.listen(now)
        belongs = self.writes(num_turns, kind)
        if belongs is None:
            belongs = outcome is Outcome.UNKNOWN
        return writes or asks or belongs

    def resumed(self, kind: Hashable, outcome: Outcome) -> None:
        """A second turn has come after a first one that ended so."""
        if outcome is Outcome.STOP or outcome in _SAYS_NOTHING:
            self._first_turns.came_back(kind)

    def way(self, prompt_tokens: int, hbm_tokens: int, below: Below, queue: Queue = NOBODY) -> Way:
        """How a waiting turn gets its KV.

        `below` are the tokens behind `hbm_tokens` that host and then NVMe hold. Loads run beside compute, so the turn
        is ready when both the queue before it and its load are done. Engine and disk are everybody's: what it takes of
        them is waited for by all who want the same, so the way is taken that costs least waiting in all.
        """
        host, nvme = below.host_tokens, below.nvme_tokens
        if not self.config.choose_loads or (nvme and self.nvme_pays()):
            return self._way(prompt_tokens, hbm_tokens, host, nvme, queue)
        ways = [self._way(prompt_tokens, hbm_tokens, h, n, queue) for h, n in {(0, 0), (host, 0), (host, nvme)}]
        return min(ways, key=lambda w: (w.price_s, -w.host_tokens - w.nvme_tokens))

    def _way(self, prompt_tokens: int, hbm_tokens: int, host: int, nvme: int, queue: Queue) -> Way:
        arrives_s = read_s = 0.0
        if nvme:
            fresh = max(0, nvme - queue.coming_tokens)
            read_s = self.nvme.seconds(int(fresh * self._bytes_per_token))
            queued_s = self.nvme.seconds(int(queue.nvme_tokens * self._bytes_per_token))
            arrives_s = max(self.nvme.wait_s(), queued_s) + read_s
        if host + nvme:
            arrives_s += self.host.wait_s() + self.host.seconds(int((host + nvme) * self._bytes_per_token))
        compute_s = self._cost.prefill_s(prompt_tokens, hbm_tokens + host + nvme)
        seconds = max(queue.compute_s, arrives_s) + compute_s
        others_s = queue.num_behind * compute_s + queue.num_reading_behind * read_s
        return Way(host, nvme, seconds, seconds + others_s)


def _per_wait(saved_s: float, wait_s: float | None, is_waiting: bool) -> float:
    if is_waiting:
        return max(0.0, saved_s) / SOONEST_S
    if wait_s is None or math.isinf(wait_s):
        return 0.0
    return max(0.0, saved_s) / max(SOONEST_S, wait_s)
