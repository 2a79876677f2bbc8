"""ATLAS of Autellix (https://arxiv.org/abs/2502.13965), re-implemented: PLAS for programs that fork and join.

What counts for a turn is the longest chain of service before it: the maximum over the turns it waited for of what
counted for them and what they took. Service beside that chain is not held against it.
"""

from typing import TYPE_CHECKING

from impala_vllm.sim.policies.plas import Plas
from impala_vllm.sim.policies.programs import Program
from impala_vllm.sim.request import Request

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica


class Atlas(Plas):
    """Least attained service along the critical path."""

    def __init__(self, replica: "Replica") -> None:
        super().__init__(replica)
        self._before: dict[str, int] = {}
        """By session: what its latest turn leaves to those after it."""
        self._at_turn: dict[tuple[str, int], int] = {}
        """The same by turn, for the children it launched."""
        self._begun: dict[Request, int] = {}

    def arrive(self, request: Request, now: float) -> None:
        super().arrive(request, now)
        session = request.session
        above = [self._before.get(name, 0) for name in (session.session_id, *request.turn.joins)]
        if request.index == 0 and session.parent_id is not None:
            above.append(self._at_turn.get((session.parent_id, session.after_turn), 0))
        self._begun[request] = max(above)

    def finish(self, request: Request, now: float) -> None:
        super().finish(request, now)
        after = self._begun.pop(request) + request.service_tokens
        self._before[request.session.session_id] = after
        self._at_turn[request.session.session_id, request.index] = after

    def attained_tokens(self, program: Program, request: Request) -> int:
        return self._begun[request] + request.service_tokens
