"""Continuum (https://arxiv.org/abs/2511.02230), re-implemented: a turn's KV stays in HBM for a time to live.

Fixed: 2 s, as in the authors' preview code. Dynamic: the time that maximises P(resume by then) x (eta x queueing +
reload) - time, with P from observed gaps of the tool (of all tools below `MIN_SAMPLES`) and eta the negative
correlation of turns done and turns left. Reload is the recompute, or the load of what host has where that is sooner; of
a copy only as much counts as those whose time to live was over have found of theirs. Turns of pinned programs go first,
then programs in order of arrival.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import TYPE_CHECKING

from impala_vllm.sim.policies.pins import Pins
from impala_vllm.sim.policies.programs import Program, Programs, is_last
from impala_vllm.sim.policies.reload import computed, loaded
from impala_vllm.sim.policy import Policy
from impala_vllm.sim.request import Request

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica

FIXED_S = 2.0
MIN_SAMPLES = 100
MAX_SAMPLES = 1000
"""Gaps remembered a tool; the rest of a long run says nothing new."""
MEMORY = 50.0
"""Turns over which queueing, and what is found of a copy, are averaged."""


class Continuum(Policy):
    """The preview code's time to live."""

    replan_s = 0.5

    def __init__(self, replica: "Replica") -> None:
        super().__init__(replica)
        self.programs = Programs()
        self.pins = Pins(replica)
        self._until_s: dict[str, float] = {}

    def ttl_s(self, program: Program) -> float:
        """How long the KV of a program that begins to act stays."""
        return FIXED_S

    def arrive(self, request: Request, now: float) -> None:
        self.programs.arrive(request, now)

    def placed(self, request: Request, now: float) -> None:
        self.programs.placed(request, now)
        self._unpin(request.session.session_id)

    def finish(self, request: Request, now: float) -> None:
        program = self.programs.finish(request, now)
        if not is_last(request):
            ttl_s = self.ttl_s(program)
            if ttl_s > 0:
                self.pins.pin(program.name, request.keys)
                self._until_s[program.name] = now + ttl_s

    def plan(self, now: float) -> Iterable[Request]:
        waiting = {r.session.session_id for r in (*self.replica.waiting, *self.replica.preempted)}
        for name in self.pins:
            # Who came back in time keeps it until it runs.
            if self._until_s[name] <= now and name not in waiting:
                self._unpin(name)
        order = sorted((*self.replica.preempted, *self.replica.waiting), key=self._place)
        stuck = self.replica.stuck
        if stuck is not None and not self.replica.running:
            # Nothing runs and somebody finds no room: whoever came last gives up its pin.
            others = [p for p in self.programs if p.name in self.pins and p.name != stuck.session.session_id]
            if others:
                self._unpin(max(others, key=lambda p: p.arrived_s).name)
        return order

    def _place(self, request: Request) -> tuple[bool, bool, float]:
        program = self.programs.of(request)
        return not request.is_preempted, program.name not in self.pins, program.arrived_s

    def _unpin(self, name: str) -> None:
        self.pins.unpin(name)
        self._until_s.pop(name, None)


class DynamicContinuum(Continuum):
    """The paper's time to live."""

    def __init__(self, replica: "Replica") -> None:
        super().__init__(replica)
        self._gaps: dict[str | None, list[float]] = {None: []}
        """Sorted, by tool; None: all of them."""
        self._queue_s = Average()
        self._found = Average(1.0)
        """Of a context whose time to live was over, when its next turn was placed."""
        self._lengths: list[int] = []
        """Turns of programs that are over."""
        self._eta = 1.0

    def ttl_s(self, program: Program) -> float:
        gaps = self._gaps.get(program.tool, [])
        if len(gaps) < MIN_SAMPLES:
            gaps = self._gaps[None]
        if len(gaps) < MIN_SAMPLES:
            return FIXED_S
        return best_ttl_s(gaps, self._eta * self._queue_s.value + self.reload_s(program))

    def reload_s(self, program: Program) -> float:
        """Expected time to get a silent program's KV back, once it is no longer kept."""
        compute_s = computed(self.replica, program.tokens).total_s
        sooner_s = min(compute_s, loaded(self.replica, program.keys, program.tokens).total_s)
        return compute_s + self._found.value * (sooner_s - compute_s)

    def arrive(self, request: Request, now: float) -> None:
        before = next((p for p in self.programs if p.name == request.session.session_id), None)
        if before is not None and before.acting_since_s is not None:
            for tool in (before.tool, None):
                gaps = self._gaps.setdefault(tool, [])
                if len(gaps) < MAX_SAMPLES:
                    insort(gaps, now - before.acting_since_s)
        super().arrive(request, now)

    def placed(self, request: Request, now: float) -> None:
        if not request.is_preempted:
            self._queue_s.add(now - request.arrived_s)
            program = self.programs.of(request)
            if program.name not in self.pins:
                self._look_for(program, request)
        super().placed(request, now)

    def finish(self, request: Request, now: float) -> None:
        super().finish(request, now)
        if is_last(request):
            self._lengths.append(request.index + 1)
            self._eta = eta(self._lengths[-MIN_SAMPLES:])

    def _look_for(self, program: Program, request: Request) -> None:
        """See how much the turn has found of what its program left behind."""
        before, keys = program.keys, request.keys
        # What the prompt no longer has nobody can find. Keys are chained: a search, not a walk.
        num_left = bisect_left(range(min(len(before), len(keys))), True, key=lambda i: before[i] != keys[i])
        if num_left:
            self._found.add(min(1.0, request.num_computed / (num_left * self.replica.shape.block_size)))


class Average:
    """Of all values at first, of about the last `MEMORY` later on."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value
        self._count = 0

    def add(self, value: float) -> None:
        self._count += 1
        self.value += max(1 / self._count, 1 / MEMORY) * (value - self.value)


def best_ttl_s(gaps: list[float], cost_s: float) -> float:
    """The time that maximises P(gap <= time) x `cost_s` - time over sorted gaps; 0 where none is worth it."""
    best_s, best_value = 0.0, 0.0
    for number, gap_s in enumerate(gaps, 1):
        value = number / len(gaps) * cost_s - gap_s
        if value > best_value:
            best_s, best_value = gap_s, value
    return best_s


def eta(lengths: list[int]) -> float:
    """Minus the correlation of turns done and turns left over all turns of programs of these lengths; 1 of too few."""
    pairs = [(done, length - done) for length in lengths for done in range(1, length + 1)]
    if len(pairs) < 2:
        return 1.0
    mean_done = sum(d for d, _ in pairs) / len(pairs)
    mean_left = sum(left for _, left in pairs) / len(pairs)
    both = sum((d - mean_done) * (left - mean_left) for d, left in pairs)
    done = sum((d - mean_done) ** 2 for d, _ in pairs)
    left = sum((left - mean_left) ** 2 for _, left in pairs)
    return 1.0 if not done or not left else max(0.0, -both / (done * left) ** 0.5)
