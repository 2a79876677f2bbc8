"""MARS (https://arxiv.org/abs/2604.26963), re-implemented: levels by feedback and by what is left to prefill.

A turn stands in the level its service has used up the quanta of, or in that of its remaining prefill where that is
higher; every 30 s of waiting lift it by one. KV of low levels goes first, the heaviest before others. Programs are let
in one after the other while the contexts of those inside fit HBM: the paper's control plane keeps HBM and processors
from being promised twice, by a rule that it does not give. Sub-agents come in with their parent.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from impala_vllm.sim.eviction import ByTrace
from impala_vllm.sim.policies.leveled import Leveled
from impala_vllm.sim.policies.programs import Program
from impala_vllm.sim.policies.stems import Stems
from impala_vllm.sim.request import Request

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica

PREFILL_TOKENS = (2048, 8192, 32768)
QUANTA_TOKENS = (2048, 1024, 512, 256)
AGEING_S = 30.0


class Mars(Leveled):
    """Feedback queues with prefill in mind."""

    def __init__(self, replica: "Replica") -> None:
        super().__init__(replica)
        self.order = self.idle = ByTrace(self._cheapest_first)
        self._stems = Stems()
        self._level_of: dict[str, int] = {}
        """Of each program when its last turn ended."""
        self._tokens_of: dict[str, int] = {}
        self._since_s: dict[Request, float] = {}
        """Since when it waits."""
        self.inside: dict[str, None] = {}
        """Programs that were let in."""

    def level(self, request: Request, now: float) -> int:
        left = max(0, request.num_tokens - max(request.num_computed, self._reach_tokens(request)))
        level = max(feedback(request.service_tokens), sum(left > bound for bound in PREFILL_TOKENS))
        since_s = self._since_s.get(request)
        return level if since_s is None else max(0, level - int((now - since_s) / AGEING_S))

    def arrive(self, request: Request, now: float) -> None:
        super().arrive(request, now)
        self._stems.arrive(request)
        self._since_s[request] = now
        name = request.session.session_id
        self._level_of[name] = -1  # its KV is about to be used
        if request.session.parent_id is not None:
            self.inside[name] = None
        self.order.new_round()

    def served(self, request: Request, now: float) -> None:
        super().served(request, now)
        self._since_s.pop(request, None)

    def passed_over(self, request: Request, now: float) -> None:
        super().passed_over(request, now)
        self._since_s.setdefault(request, now)

    def finish(self, request: Request, now: float) -> None:
        program: Program = self.programs.of(request)
        super().finish(request, now)
        self._since_s.pop(request, None)
        self._level_of[program.name] = feedback(request.service_tokens)
        self._tokens_of[program.name] = program.tokens
        if program.name not in self.programs:
            self.inside.pop(program.name, None)
        self.order.new_round()

    def admits(self, request: Request) -> bool:
        return request.session.session_id in self.inside

    def plan(self, now: float) -> Iterable[Request]:
        self._let_in()
        order = list(super().plan(now))
        self.held = [r for r in order if not self.admits(r)]
        return [r for r in order if self.admits(r)]

    def owner(self, request: Request) -> tuple[str | None, int]:
        return request.session.session_id, self._stems.depth(request)

    def _let_in(self) -> None:
        shape = self.replica.shape
        left = shape.num_blocks * shape.block_size - sum(p.tokens for p in self.programs if p.name in self.inside)
        for program in self.programs:
            if program.name in self.inside:
                continue
            if self.inside and program.tokens > left:
                return
            self.inside[program.name] = None
            left -= program.tokens

    def _reach_tokens(self, request: Request) -> int:
        if request.blocks:
            return request.num_computed
        size, tiers = self.replica.shape.block_size, self.replica.tiers
        limit = (request.num_tokens - 1) // size
        reach = len(self.replica.pool.find(request.keys, limit))
        if tiers is not None:
            reach += tiers.num_ready(request.keys[reach:limit])
        return reach * size

    def _cheapest_first(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda n: (-self._level_of.get(n, 0), -self._tokens_of.get(n, 0)))


def feedback(attained: int) -> int:
    """The level whose quantum this much service is in."""
    used = 0
    for level, quantum in enumerate(QUANTA_TOKENS[:-1]):
        used += quantum
        if attained <= used:
            return level
    return len(QUANTA_TOKENS) - 1
