"""Who is in a replica's next step, and on which blocks: queues, placing, growing and preempting as vLLM does them.

It takes no time and asks for none: `Replica` says when a step is, and how long it takes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from impala_vllm.sim.accesses import Accesses
from impala_vllm.sim.policy import Policy
from impala_vllm.sim.pool import Pool
from impala_vllm.sim.request import Request
from impala_vllm.sim.tiers import Room, Tiers


@dataclass(frozen=True, slots=True)
class Shape:
    """What a replica has room for."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    below: Room | None = None
    """None: HBM alone."""


class Scheduler:
    """Policies read everything and change nothing."""

    policy: Policy
    pool: Pool
    tiers: Tiers | None
    """None: HBM alone."""

    def __init__(self, shape: Shape, computed: set[int]) -> None:
        """`computed` holds the keys of all blocks that any replica of the run has computed."""
        self.shape = shape
        self.running: list[Request] = []
        self.waiting: dict[Request, None] = {}
        """In order of arrival, preempted ones apart."""
        self.preempted: dict[Request, None] = {}
        """The last one first in line."""
        self.loading: dict[Request, None] = {}
        """They have blocks, and wait for what a tier below brings into them."""
        self.loaded: dict[Request, None] = {}
        """Theirs is there; they go before all that wait."""
        self.stuck: Request | None = None
        """Who was tried in the last step and found no room, be it for the rest of a prompt that is loaded in part."""
        self.computed_tokens = self.recomputed_tokens = self.num_preemptions = 0
        self.found_tokens = 0
        """Of prompts, by turns when they got their places."""
        self.accesses: Accesses | None = None
        """Told what HBM is asked for, where somebody wants to know."""
        self._computed = computed
        self._has_preempted = False
        """In the step at hand: then nobody is placed."""

    @property
    def num_unfinished(self) -> int:
        return len(self.running) + len(self.waiting) + len(self.preempted) + len(self.loading) + len(self.loaded)

    @property
    def is_full(self) -> bool:
        """What runs takes all tokens of a step: nobody can be placed in it."""
        budget = self.shape.max_num_batched_tokens
        for request in self.running:
            budget -= request.num_tokens - request.num_computed
            if budget <= 0:
                return True
        return False

    def promised_blocks(self) -> int:
        """Blocks that prefills under way still have to take."""
        size = self.shape.block_size
        under_way = [r for r in (*self.running, *self.loading, *self.loaded) if r.is_prefilling]
        return sum(max(0, -(-r.num_tokens // size) - len(r.blocks)) for r in under_way)

    def _schedule(self, now: float) -> list[tuple[Request, int]]:
        for request in list(self.policy.gives_way(now)):
            self._preempt(request, now)
        plan = self.policy.plan(now)
        for request in self.policy.held:
            if request.held_since_s is None:
                request.held_since_s = now
        self.policy.order_running()
        scheduled: list[tuple[Request, int]] = []
        self._has_preempted = False
        num_first = len(self.running) - self.policy.num_after_placed(now)
        first, after = self.running[:num_first], self.running[num_first:]
        budget = self._advance(first, after, self.shape.max_num_batched_tokens, scheduled, now)
        self.stuck = None
        if not self._has_preempted:
            budget = self._place(plan, budget, scheduled, now)
        self._advance(after, [], budget, scheduled, now)
        return scheduled

    def _advance(
        self,
        requests: list[Request],
        behind: list[Request],
        budget: int,
        scheduled: list[tuple[Request, int]],
        now: float,
    ) -> int:
        """Give running requests tokens, in this order, until HBM is out; returns what is left of the budget.

        Who loses its place for it is gone from the lists; those `behind` get nothing here and may lose theirs.
        """
        index = 0
        while index < len(requests) and budget > 0:
            request = requests[index]
            count = min(request.num_tokens - request.num_computed, budget)
            while not self._grow(request, count):
                victim = self.policy.victim([*requests[index:], *behind])
                (behind if victim in behind else requests).remove(victim)
                self._preempt(victim, now)
                if victim is request:
                    return budget
            scheduled.append((request, count))
            budget -= count
            index += 1
        return budget

    def _place(self, plan: Iterable[Request], budget: int, scheduled: list[tuple[Request, int]], now: float) -> int:
        """Let those start who fit with their whole prompt, one after the other until one does not; as `_advance`."""
        size, pool = self.shape.block_size, self.pool
        for request in (*self.loaded, *plan):
            if budget <= 0 or len(self.running) >= self.shape.max_num_seqs:
                return budget
            if request not in self.loaded:
                self.stuck = request
                limit = (request.num_tokens - 1) // size
                hits = pool.find(request.keys, limit)
                further = self.tiers.reach(request, len(hits), limit) if self.tiers is not None else 0
                if further is None:
                    self.stuck = None
                    continue  # what it waits for is on its way into host
                missing, idle = -(-request.num_tokens // size) - len(hits), pool.num_idle_of(hits)
                if missing + idle > pool.num_free:
                    return budget
                if further and further + idle > pool.num_free - self.promised_blocks():
                    return budget
                self.stuck = None
                pool.touch(hits)
                if self.accesses is not None:
                    self.accesses.looked_up(request.keys[:limit], len(hits), pool.num_free)
                request.blocks = hits
                request.num_computed = len(hits) * size
                if further:
                    self._load(request, further, now)
                    continue
                self._leave_queue(request, now)
            count = min(request.num_tokens - request.num_computed, budget)
            if not self._grow(request, count):
                self.stuck = request
                return budget
            self.loaded.pop(request, None)
            self.running.append(request)
            scheduled.append((request, count))
            budget -= count
        return budget

    def _load(self, request: Request, count: int, now: float) -> None:
        """Give the request its next `count` blocks and have a tier below fill them."""
        assert self.tiers is not None
        size, start = self.shape.block_size, len(request.blocks)
        request.blocks += self.pool.take(count)
        request.num_computed += count * size
        self._leave_queue(request, now)
        self.loading[request] = None
        keys = request.keys[start : start + count]

        def done() -> None:
            self.pool.cache(request.blocks[start:], keys)
            del self.loading[request]
            self.loaded[request] = None

        self.tiers.load(request, start, keys, done)

    def _leave_queue(self, request: Request, now: float) -> None:
        self.policy.placed(request, now)
        self.found_tokens += request.num_computed
        if request.is_preempted:
            del self.preempted[request]
            request.is_preempted = False
            return
        del self.waiting[request]
        request.cached_tokens = request.num_computed
        if request.held_since_s is not None:
            request.held_s = now - request.held_since_s

    def _grow(self, request: Request, count: int) -> bool:
        """Give the request's next `count` tokens their blocks, found by key once they are full. False: no room."""
        size, blocks, before = self.shape.block_size, request.blocks, request.num_computed
        done = before + count
        missing = -(-done // size) - len(blocks)
        if missing > 0:
            if missing > self.pool.num_free:
                return False
            blocks += self.pool.take(missing)
        first, last = before // size, done // size
        if first < last:
            keys = request.keys[first:last]
            self.pool.cache(blocks[first:last], keys)
            if self.accesses is not None:
                self.accesses.filled(keys, self.pool.num_free)
            of_prompt = keys[: max(0, request.prompt_tokens // size - first)]
            self.recomputed_tokens += size * len(self._computed.intersection(of_prompt))
            self._computed.update(keys)
        request.service_tokens += count
        if before < request.prompt_tokens:
            self.computed_tokens += min(done, request.prompt_tokens) - before
        return True

    def _preempt(self, request: Request, now: float) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_computed = 0
        request.is_preempted = True
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._has_preempted = True
        self.preempted[request] = None
        self.policy.preempted(request, now)

    def _release(self, request: Request) -> None:
        owner, num_stem = self.policy.owner(request)
        self.pool.release(request.blocks, owner, num_stem)
        if self.accesses is not None:
            self.accesses.let_go(request.keys[: request.num_computed // self.shape.block_size], self.pool.num_free)
        request.blocks = []
