"""TokenCake's temporal scheduler (https://arxiv.org/abs/2510.18586), re-implemented: offload in calls, upload ahead.

A call is expected to take as long as that tool's have on average. Where it is worth the way to host and back, the
program's KV is the first to go; just before the call is expected to end, it is loaded into places nobody needs. Its
spatial scheduler, which reserves HBM for agents of a declared graph, has nothing to go by here. First come, first
served.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from impala_vllm.sim.eviction import ByTrace
from impala_vllm.sim.loop import Loop
from impala_vllm.sim.policies.prefetch import Prefetch
from impala_vllm.sim.policies.programs import Programs, is_last
from impala_vllm.sim.policies.stems import Stems
from impala_vllm.sim.policy import Policy
from impala_vllm.sim.request import Request
from impala_vllm.sim.tiers import Room, Tiers

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica

UNKNOWN_S = 1.0
"""A tool nobody has called yet."""
MEMORY = 0.5
"""Weight of a tool's last call in its expected time; the paper says an average of history, not which."""
WAYS = 2.0
"""A call is worth offloading where it takes longer than the way out and back."""


class TokenCake(Policy):
    """Predictive upload."""

    def __init__(self, replica: "Replica") -> None:
        super().__init__(replica)
        self.order = self.idle = ByTrace(self._offloaded_first)
        self.prefetch = Prefetch(replica)
        self.programs = Programs()
        self._stems = Stems()
        self._expected_s: dict[str | None, float] = {}
        self._offloaded: dict[str, float] = {}
        """When each is expected back."""
        self._used_s: dict[str, float] = {}
        self._loop: Loop | None = None

    def tiers(self, loop: Loop, room: Room) -> Tiers:
        self._loop = loop
        return super().tiers(loop, room)

    def expected_s(self, tool: str | None) -> float:
        """How long a call of this tool will take."""
        return self._expected_s.get(tool, UNKNOWN_S)

    def arrive(self, request: Request, now: float) -> None:
        self._stems.arrive(request)
        name = request.session.session_id
        known = name in self.programs
        if known:
            program = self.programs.of(request)
            if program.acting_since_s is not None:
                self._learn(program.tool, now - program.acting_since_s)
        self.programs.arrive(request, now)
        self._offloaded.pop(name, None)
        self._used_s[name] = now
        self.order.new_round()

    def placed(self, request: Request, now: float) -> None:
        self.programs.placed(request, now)

    def finish(self, request: Request, now: float) -> None:
        program = self.programs.finish(request, now)
        self._used_s[program.name] = now
        self.order.new_round()
        if is_last(request) or self._loop is None:
            return
        call_s, load_s = self.expected_s(program.tool), self.prefetch.load_s(len(request.keys))
        if call_s > WAYS * load_s:
            back_s = self._offloaded[program.name] = now + call_s
            self._loop.at(back_s - load_s, partial(self._upload, program.name, back_s, request.keys))

    def owner(self, request: Request) -> tuple[str | None, int]:
        return request.session.session_id, self._stems.depth(request)

    def _learn(self, tool: str | None, took_s: float) -> None:
        before = self._expected_s.get(tool)
        self._expected_s[tool] = took_s if before is None else before + MEMORY * (took_s - before)

    def _upload(self, name: str, back_s: float, keys: Sequence[int]) -> None:
        if self._offloaded.get(name) == back_s:
            del self._offloaded[name]
            self._used_s[name] = back_s
            self.order.new_round()
            self.prefetch.bring(keys, name)

    def _offloaded_first(self, names: Iterable[str]) -> list[str]:
        """Those in long calls, who is expected last first; then who was used longest ago."""
        return sorted(
            names, key=lambda n: (n not in self._offloaded, -self._offloaded.get(n, 0.0), self._used_s.get(n, 0.0))
        )
