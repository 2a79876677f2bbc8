"""PLAS of Autellix (https://arxiv.org/abs/2502.13965), re-implemented: the program with least attained service first.

A program's service is summed over its turns and cut into levels; a program that waited `BETA` times as long as it was
served goes to the top. Level bounds are those of MARS's own re-implementation.
"""

from impala_vllm.sim.policies.leveled import Leveled
from impala_vllm.sim.policies.programs import Program
from impala_vllm.sim.request import Request

LEVEL_TOKENS = (2048, 8192, 32768)
BETA = 2.0


class Plas(Leveled):
    """Least attained service, by program."""

    def level(self, request: Request, now: float) -> int:
        program = self.programs.of(request)
        if self._starves(program, now):
            return 0
        attained = self.attained_tokens(program, request)
        return sum(attained > bound for bound in LEVEL_TOKENS)

    def attained_tokens(self, program: Program, request: Request) -> int:
        """Service that counts for the turn."""
        return program.attained_tokens()

    def _starves(self, program: Program, now: float) -> bool:
        waited_s, served_s = program.waited_s, program.served_s
        if program.placed_s is None:
            waited_s += now - program.waits_since_s
        else:
            served_s += now - program.placed_s
        return served_s > 0 and waited_s / served_s >= BETA
