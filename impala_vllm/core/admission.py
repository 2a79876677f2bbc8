"""Which waiting turns may take HBM now, and which are held until room comes cheaper.

Admission protects the working set that pays: idle KV is kept while its trace will probably be back before
its recompute would have paid for the wait. A turn is admitted when it fits beside what is kept; an engine
that runs nothing is never left idle; a turn past its bound is held by more urgent ones alone. Bytes are counted in
blocks.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from impala_vllm.core.cost import StepCost
from impala_vllm.core.rank import Waiting
from impala_vllm.core.types import RequestId

MAX_PASSED = 64
"""After so many turns that found no room the rest of the queue is held unseen: bounds the cost of a step."""


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """Fixed on purpose: the price of patience."""

    enabled: bool = True
    """Hold turns while idle KV is worth its room; off: everybody is admitted."""
    patience: float = 7.0
    """Idle KV is kept while its expected wait is below this many times its recompute. A prior: 5 to 12 made no
    difference in a sketch of agent batches at 4x and 8x; a benchmark has yet to settle it."""


class Asking(NamedTuple):
    """A ranked turn and the room it needs."""

    turn: Waiting
    new_blocks: int
    """Blocks it must allocate to finish: prompt and expected output, less what it finds in HBM."""
    own_idle_blocks: int
    """Blocks it finds in HBM that count as free until it takes them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision for one step."""

    admitted: list[Asking]
    num_held: int


class Admission:
    """Stateless but for its configuration; the costs are shared with rank and retention."""

    def __init__(self, cost: StepCost, hold_s: float, config: AdmissionConfig | None = None) -> None:
        """No turn is held for `hold_s` or longer."""
        self.config = config or AdmissionConfig()
        self._hold_s = hold_s
        self._cost = cost

    def keeps(self, num_tokens: int, wait_s: float | None, back_s: float | None = None) -> bool:
        """Is this KV worth its room until the trace is back, after a median of `wait_s`? None: it is not expected.

        `back_s`: what it costs to get it back from a tier below; None: it would be computed again.
        """
        price_s = self._cost.prefill_s(num_tokens) if back_s is None else back_s
        return wait_s is not None and wait_s < self.config.patience * price_s

    def plan(
        self,
        asking: Sequence[Asking],
        kept_blocks: int,
        free_blocks: int,
        num_running: int,
        now: float,
        skipped: Collection[RequestId] = (),
    ) -> Plan:
        """Admit turns in rank order while they fit beside what is kept. O(admitted + `MAX_PASSED`).

        `asking` is in order of rank: by priority, then preempted turns and those past their bound first.
        `free_blocks` are all blocks no request references, kept ones included. `skipped` could not begin for another
        reason than room, since something ran last: where nothing runs they do not count as admitted.
        """
        if not self.config.enabled:
            return Plan(list(asking), 0)
        room = free_blocks - kept_blocks
        admitted: list[Asking] = []
        held_priority: int | None = None
        num_passed = 0
        late_s = now - self._hold_s
        for ask in asking:
            if num_passed == MAX_PASSED:
                break
            turn = ask.turn
            if held_priority is not None and turn.priority > held_priority:
                break  # the client said that the one held comes first
            if turn.arrived_s > late_s and not turn.preempted:
                if room < 0:
                    break  # whatever they ask for
                if ask.new_blocks > room - ask.own_idle_blocks:
                    held_priority = turn.priority if held_priority is None else held_priority
                    num_passed += 1
                    continue
            admitted.append(ask)
            room -= ask.new_blocks + ask.own_idle_blocks
        if num_running == 0 and all(ask.turn.request_id in skipped for ask in admitted):
            able = next((ask for ask in asking if ask.turn.request_id not in skipped), None)
            admitted = [*admitted, able] if able is not None else list(asking)
        return Plan(admitted, len(asking) - len(admitted))
