"""PLAS of Autellix (https://arxiv.org/abs/2502.13965), re-implemented: the program with least attained service first.

A program's service is summed over its turns and cut into levels. A turn of a program that waited `BETA` times as long
as it was served goes to the top for a quantum of it, and both count from zero again: what a program was served before
still says its level, so that not all are at the top in the end. Level bounds are those of MARS's own re-implementation.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from impala_vllm.sim.policies.leveled import Leveled
from impala_vllm.sim.policies.programs import Program
from impala_vllm.sim.request import Request

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica

LEVEL_TOKENS = (2048, 8192, 32768)
BETA = 2.0


class Plas(Leveled):
    """Least attained service, by program."""

    def __init__(self, replica: "Replica") -> None:
        super().__init__(replica)
        self._promoted: dict[Request, int] = {}
        """What each had been served when it was."""

    def level(self, request: Request, now: float) -> int:
        since = self._promoted.get(request)
        if since is not None and request.service_tokens - since <= LEVEL_TOKENS[0]:
            return 0
        attained = self.attained_tokens(self.programs.of(request), request)
        return sum(attained > bound for bound in LEVEL_TOKENS)

    def attained_tokens(self, program: Program, request: Request) -> int:
        """Service that counts for the turn."""
        return program.attained_tokens()

    def gives_way(self, now: float) -> Iterable[Request]:
        replica = self.replica
        for request in (*replica.preempted, *replica.waiting, *replica.running):
            program = self.programs.of(request)
            if program.placed_s is None and self._starves(program, now):
                self._promoted[request] = request.service_tokens
                program.waited_s = program.served_s = 0.0
                program.waits_since_s = now
        return super().gives_way(now)

    def finish(self, request: Request, now: float) -> None:
        super().finish(request, now)
        self._promoted.pop(request, None)

    def _starves(self, program: Program, now: float) -> bool:
        waited_s = program.waited_s + now - program.waits_since_s
        return program.served_s > 0 and waited_s / program.served_s >= BETA
