"""Multi-level queues: who stands in a lower level goes first, inside a level the first come."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from impala_vllm.sim.policies.programs import Programs
from impala_vllm.sim.policy import Policy
from impala_vllm.sim.request import Request

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica


class Leveled(Policy):
    """The levels are the subclass's. Each step's tokens go by level, those of prompts as the papers' iterations do.

    One running request a step also gives its seat to a lower level's that finds none. Its seat, not its HBM: the papers
    swap what they preempt, here it would have to be computed again (tried: jobs of `benchmarks.sim.papers` took 1.5
    times as long under MARS). Nor where it would be loaded again from a tier (tried: each newcomer took somebody's, and
    PLAS took 0.044 s a token instead of 0.026).
    """

    replan_s = reorder_s = 1.0

    def __init__(self, replica: "Replica") -> None:
        super().__init__(replica)
        self.programs = Programs()
        self._served: dict[Request, int] = {}
        """What each running request had got when the last step began."""

    @abstractmethod
    def level(self, request: Request, now: float) -> int:
        """0 goes first."""

    def arrive(self, request: Request, now: float) -> None:
        self.programs.arrive(request, now)

    def placed(self, request: Request, now: float) -> None:
        self.served(request, now)

    def preempted(self, request: Request, now: float) -> None:
        self._served.pop(request, None)
        self.passed_over(request, now)

    def finish(self, request: Request, now: float) -> None:
        self._served.pop(request, None)
        self.programs.finish(request, now)

    def served(self, request: Request, now: float) -> None:
        """It gets tokens from now on; it may have got some before."""
        self.programs.placed(request, now)

    def passed_over(self, request: Request, now: float) -> None:
        """It waits from now on, with or without a seat; it may have waited before."""
        self.programs.preempted(request, now)

    def plan(self, now: float) -> Iterable[Request]:
        self._now = now
        waiting = [*self.replica.preempted, *self.replica.waiting]
        return sorted(waiting, key=lambda r: self._place(r, now))

    def order_running(self) -> None:
        """Decodes first, they take a token each; then prompts by level, so that no short turn waits for a long one."""
        running = self.replica.running
        for request in running:
            if self._served.get(request) == request.service_tokens:
                self.passed_over(request, self._now)
            else:
                self.served(request, self._now)
            self._served[request] = request.service_tokens
        running.sort(key=lambda r: (r.is_prefilling, *self._place(r, self._now)))

    def num_after_placed(self, now: float) -> int:
        """Prompts of higher levels than whoever is next, if there are blocks for it that nobody was promised."""
        replica = self.replica
        if not replica.running or len(replica.running) >= replica.shape.max_num_seqs:
            return 0
        waiting = [r for r in (*replica.preempted, *replica.waiting) if self.admits(r)]
        first = min((*replica.loaded, *waiting), key=lambda r: self._place(r, now), default=None)
        if first is None or self._lacking(first) > replica.pool.num_free - replica.promised_blocks():
            return 0
        level = self.level(first, now)
        return sum(r.is_prefilling and self.level(r, now) > level for r in replica.running)

    def victim(self, left: Sequence[Request]) -> Request:
        return max(left, key=lambda r: self._place(r, self._now))

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
        first, last = min(waiting, key=lambda r: self._place(r, now)), self.victim(replica.running)
        return (last,) if self.level(first, now) < self.level(last, now) else ()

    _now = 0.0

    def _lacking(self, request: Request) -> int:
        """Free blocks that it takes, besides those it was promised."""
        if request.blocks:
            return 0
        pool, size = self.replica.pool, self.replica.shape.block_size
        hits = pool.find(request.keys, (request.num_tokens - 1) // size)
        return -(-request.num_tokens // size) - len(hits) + pool.num_idle_of(hits)

    def _place(self, request: Request, now: float) -> tuple[int, float]:
        return self.level(request, now), request.arrived_s
