"""ThunderAgent (https://arxiv.org/abs/2602.13692), re-implemented: whole programs are paused when HBM is full.

Contexts of programs that reason, and those of programs that act at a weight, may not exceed HBM. Every `CHECK_S` the
smallest acting programs are paused until that holds, then the smallest that reason, at the end of their turn; then
paused ones resume, the smallest first, where they fit. A paused program's turn is held. The engine itself is stock.
It never idles for a claim: programs that hold one may wait for a paused one, as a parent does for its sub-agent.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from impala_vllm.sim.policies.programs import Program, Programs
from impala_vllm.sim.policy import Policy
from impala_vllm.sim.request import Request

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica

CHECK_S = 5.0
BUFFER_TOKENS = 100
"""Left to every program for its output, as in the authors' code."""


class ThunderAgent(Policy):
    """The paper's weight of acting programs: halved with every second."""

    replan_s = CHECK_S

    def __init__(self, replica: "Replica") -> None:
        super().__init__(replica)
        self.programs = Programs()
        self.paused: dict[str, None] = {}
        self.marked: set[str] = set()
        """To be paused when their turn is done."""
        self._checked_s = 0.0
        self._room = replica.shape.num_blocks * replica.shape.block_size

    def weight(self, acting_s: float) -> float:
        """What counts of a context after so long in a tool."""
        return 2.0**-acting_s

    def arrive(self, request: Request, now: float) -> None:
        used = self.used_tokens(now)
        program = self.programs.arrive(request, now)
        is_full = bool(self.paused) or used + program.tokens + BUFFER_TOKENS > self._room
        if request.index == 0 and is_full and len(self.programs) > 1:  # an empty server takes whatever comes
            self.paused[program.name] = None

    def finish(self, request: Request, now: float) -> None:
        name = self.programs.finish(request, now).name
        if name in self.marked:
            self.marked.discard(name)
            if name in self.programs:
                self.paused[name] = None

    def plan(self, now: float) -> Iterable[Request]:
        if now - self._checked_s >= CHECK_S:
            self._checked_s = now
            self._pause(now)
            self._resume(now)
        order = list(super().plan(now))
        self.held = [r for r in order if r.session.session_id in self.paused]
        return [r for r in order if r.session.session_id not in self.paused]

    def used_tokens(self, now: float) -> float:
        """HBM that programs lay claim to which are neither paused nor about to be."""
        return sum(
            self._claim(p, now) for p in self.programs if p.name not in self.paused and p.name not in self.marked
        )

    def _claim(self, program: Program, now: float) -> float:
        acting_s = None if program.acting_since_s is None else now - program.acting_since_s
        return BUFFER_TOKENS + program.tokens * (1.0 if acting_s is None else self.weight(acting_s))

    def _pause(self, now: float) -> None:
        live = [p for p in self.programs if p.name not in self.paused and p.name not in self.marked]
        used = self.used_tokens(now)
        for program in sorted(live, key=lambda p: (p.request is not None, p.tokens)):
            if used <= self._room:
                return
            used -= self._claim(program, now)
            if program.request is None:
                self.paused[program.name] = None
            else:
                self.marked.add(program.name)

    def _resume(self, now: float) -> None:
        used, is_idle = self.used_tokens(now), self._is_idle()
        for program in sorted((p for p in self.programs if p.name in self.paused), key=_eager_first):
            claim = program.tokens + BUFFER_TOKENS
            # A program as large as the server runs alone.
            if used + claim <= self._room or used == 0 or is_idle:
                is_idle = False
                used += claim
                del self.paused[program.name]

    def _is_idle(self) -> bool:
        """Nobody runs, and whoever waits is paused."""
        replica = self.replica
        waiting = (*replica.waiting, *replica.preempted)
        is_busy = replica.running or replica.loading or replica.loaded or not waiting
        return not is_busy and all(r.session.session_id in self.paused for r in waiting)


class ThunderAgentProxy(ThunderAgent):
    """The authors' public proxy as it comes: a program in a tool counts in full."""

    def weight(self, acting_s: float) -> float:
        return 1.0


def _eager_first(program: Program) -> tuple[int, int]:
    """Those with a turn that waits, then new ones, then those in a tool; each the smallest first."""
    if program.request is None:
        return 2, program.tokens
    return int(program.num_turns == 0), program.tokens
