"""InferCept (https://arxiv.org/abs/2402.01869), re-implemented: preserve, swap or discard, what wastes least.

Preserving a context of C tokens through a tool call wastes gap x C; discarding it wastes its recompute x C, and the
same time for the tokens of all others that wait meanwhile; one that was swapped wastes its load x C, because transfers
run beside steps here and nobody waits for them. What host has a copy of is swapped without a transfer, and the copy
stays there until it is loaded. A gap is expected to be as long again as it has been. Turns in order of their program's
arrival.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from impala_vllm.sim.policies.pins import HostPins, Pins
from impala_vllm.sim.policies.programs import Program, Programs, is_last
from impala_vllm.sim.policies.reload import Reload, computed, loaded
from impala_vllm.sim.policy import Policy
from impala_vllm.sim.request import Request

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica

REPLAN_S = 0.5


class InferCept(Policy):
    """Waste of memory over time, in token-seconds."""

    replan_s = REPLAN_S

    def __init__(self, replica: "Replica") -> None:
        super().__init__(replica)
        self.programs = Programs()
        self.pins = Pins(replica)
        self.swapped = HostPins(replica)
        self._copies: dict[str, tuple[float, Reload]] = {}
        """How what host has would be loaded, and when that was looked up: every `REPLAN_S`, not every step."""

    def arrive(self, request: Request, now: float) -> None:
        self.programs.arrive(request, now)

    def placed(self, request: Request, now: float) -> None:
        name = request.session.session_id
        self.programs.placed(request, now)
        self.pins.unpin(name)
        self.swapped.unpin(name)
        self._copies.pop(name, None)

    def finish(self, request: Request, now: float) -> None:
        program = self.programs.finish(request, now)
        if not is_last(request):
            self.pins.pin(program.name, request.keys)

    def plan(self, now: float) -> Iterable[Request]:
        others = sum(r.num_tokens for r in self.replica.running)
        pinned = [p for p in self.programs if p.name in self.pins and p.acting_since_s is not None]
        for program in pinned:
            swap, discard = self.swap(program, others, now), self.discard(program, others)
            if self.preserve(program, now) > min(swap, discard):
                self.pins.unpin(program.name)
                if swap < discard:
                    self.swapped.pin(program.name, program.keys)
        order = sorted((*self.replica.preempted, *self.replica.waiting), key=lambda r: self.programs.of(r).arrived_s)
        stuck = self.replica.stuck
        if stuck is not None and not self.replica.running:
            # Nothing runs and somebody finds no room: what wastes most goes, and then what waits itself.
            holders = [p for p in self.programs if p.name in self.pins and p.name != stuck.session.session_id]
            if holders:
                self.pins.unpin(max(holders, key=lambda p: (self.preserve(p, now), p.arrived_s)).name)
        return order

    def preserve(self, program: Program, now: float) -> float:
        """Expected waste of keeping a silent program's KV."""
        if program.acting_since_s is None:
            return 0.0
        return (now - program.acting_since_s) * program.tokens

    def discard(self, program: Program, other_tokens: int) -> float:
        """Expected waste of computing it again beside `other_tokens` of context that run."""
        return _waste(computed(self.replica, program.tokens), program, other_tokens)

    def swap(self, program: Program, other_tokens: int, now: float) -> float:
        """The same of loading what host has of it and computing the rest."""
        seen = self._copies.get(program.name)
        if seen is None or now - seen[0] >= REPLAN_S:
            seen = self._copies[program.name] = now, loaded(self.replica, program.keys, program.tokens)
        return _waste(seen[1], program, other_tokens)


def _waste(way: Reload, program: Program, other_tokens: int) -> float:
    return way.total_s * program.tokens + way.compute_s * other_tokens
