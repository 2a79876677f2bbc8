"""Multi-level queues: who stands in a lower level goes first, inside a level the first come."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from impala_vllm.sim.policies.programs import Programs
from impala_vllm.sim.policy import Policy
from impala_vllm.sim.request import Request

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica


class Leveled(Policy):
    """The levels are the subclass's. One running request a step gives its seat to a lower level's that finds none.

    Its seat, not its HBM: the papers swap what they preempt, here it would have to be computed again (tried: jobs of
    `benchmarks.sim.papers` took 1.5 times as long under MARS). Nor where it would be loaded again from a tier (tried:
    each newcomer took somebody's, and PLAS took 0.044 s a token instead of 0.026).
    """

    replan_s = 1.0

    def __init__(self, replica: "Replica") -> None:
        super().__init__(replica)
        self.programs = Programs()

    @abstractmethod
    def level(self, request: Request, now: float) -> int:
        """0 goes first."""

    def arrive(self, request: Request, now: float) -> None:
        self.programs.arrive(request, now)

    def placed(self, request: Request, now: float) -> None:
        self.programs.placed(request, now)

    def preempted(self, request: Request, now: float) -> None:
        self.programs.preempted(request, now)

    def finish(self, request: Request, now: float) -> None:
        self.programs.finish(request, now)

    def plan(self, now: float) -> Iterable[Request]:
        self._now = now
        waiting = [*self.replica.preempted, *self.replica.waiting]
        return sorted(waiting, key=lambda r: self._place(r, now))

    def victim(self) -> Request:
        return max(self.replica.running, key=lambda r: self._place(r, self._now))

    def admits(self, request: Request) -> bool:
        """May the request be placed at all?"""
        return True

    def gives_way(self, now: float) -> Iterable[Request]:
        self._now = now
        replica = self.replica
        if not replica.running or len(replica.running) < replica.shape.max_num_seqs:
            return ()
        waiting = [r for r in (*replica.preempted, *replica.waiting) if self.admits(r)]
        if not waiting:
            return ()
        first, last = min(waiting, key=lambda r: self._place(r, now)), self.victim()
        return (last,) if self.level(first, now) < self.level(last, now) else ()

    _now = 0.0

    def _place(self, request: Request, now: float) -> tuple[int, float]:
        return self.level(request, now), request.arrived_s
