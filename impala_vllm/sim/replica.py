"""One engine: continuous batching, chunked prefill, prefix caching and preemption as vLLM's scheduler does them.

A step is scheduled, takes the time that `Timing` says, and then its tokens are there. Steps that are alike, because all
only decode or one long prompt takes what the others leave, are one leap, which an arrival cuts short at a step's end.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from impala_vllm.sim.leap import Leap
from impala_vllm.sim.loop import Loop
from impala_vllm.sim.policy import Policy
from impala_vllm.sim.pool import Pool
from impala_vllm.sim.request import Request
from impala_vllm.sim.tiers import Room
from impala_vllm.sim.timing import Timing

IDLE_S, IDLE_SHARE = 0.01, 0.02
"""Nothing runs and nobody may start: asked again after so long, or in this share of what policy plans ahead."""

LOADING_S = 1.0
"""The same where only a load can change anything: its end wakes the replica."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a replica has room for."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    below: Room | None = None
    """None: HBM alone."""


class Step(NamedTuple):
    """A step, or several alike."""

    start_s: float
    end_s: float
    prompt_tokens: int
    """Of all of them."""
    num_decoding: int
    """In each."""


class Replica:
    """Requests come in by `arrive` and leave by their `on_done`. The policy reads everything, changes nothing."""

    def __init__(
        self, loop: Loop, timing: Timing, shape: Shape, policy: Callable[["Replica"], Policy], computed: set[int]
    ) -> None:
        """`computed` holds the keys of all blocks that any replica of the run has computed."""
        self.shape = shape
        self.timing = timing
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
        self.policy = policy(self)
        self.pool = Pool(shape.num_blocks, self.policy.idle)
        self.tiers = self.policy.tiers(loop, shape.below) if shape.below is not None else None
        if self.tiers is not None:
            self.tiers.on_arrival = self._notice
        self.computed_tokens = self.recomputed_tokens = self.num_preemptions = 0
        self.busy_s = 0.0
        self.on_step: Callable[[Step], None] | None = None
        """Told of every step or leap when it is over."""
        self._loop = loop
        self._computed = computed
        self._leap: Leap | None = None
        self._is_awake = False
        self._num_naps = 0
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

    def arrive(self, request: Request) -> None:
        """Take a request; it waits until the step that runs is over."""
        now = self._loop.now
        self.policy.arrive(request, now)
        self.waiting[request] = None
        self._wake()

    def _wake(self) -> None:
        """Something has changed: plan as soon as the step that runs is over."""
        now = self._loop.now
        if not self._is_awake:
            self._is_awake = self.num_unfinished > 0
            if self._is_awake:
                self._num_naps += 1
                self._loop.at(now, partial(self._step, self._num_naps))
        elif self._leap is not None and self._leap.cut(now):
            self._loop.at(self._leap.end_s, partial(self._land, self._leap, self._leap.num_steps))

    def _notice(self) -> None:
        """A transfer has ended; what that means is seen between steps."""
        assert self.tiers is not None
        if self._is_awake or self.num_unfinished:
            self._wake()
        else:
            self.tiers.poll()

    def _step(self, nap: int | None = None) -> None:
        """Schedule. `nap`: only if nobody has woken the replica since."""
        if nap is not None and nap != self._num_naps:
            return
        self._is_awake = True
        now = self._loop.now
        if self.tiers is not None:
            self.tiers.poll()
        scheduled = self._schedule(now)
        if self.tiers is not None:
            for request, count in scheduled:
                self.tiers.scheduled(request, (request.num_computed + count) // self.shape.block_size)
            self.tiers.planned()
        if not scheduled:
            self._is_awake = False
            self._num_naps += 1
            if self.num_unfinished:
                nap_s = max(IDLE_S, IDLE_SHARE * (self.policy.replan_s or 0.0))
                if self.policy.replan_s is None and self.tiers is not None:
                    nap_s = LOADING_S
                self._loop.again(now + nap_s, partial(self._step, self._num_naps), type(self.policy).__name__)
            return
        prompts: list[tuple[int, int]] = []
        context = 0
        for request, count in scheduled:
            before = request.num_computed
            if count > 1 or before < request.prompt_tokens:
                prompts.append((count, before))
            else:
                context += before
        num_decoding = len(scheduled) - len(prompts)
        step_s = self.timing.step_s(prompts, num_decoding, context)
        num_alike = self._num_alike(scheduled, prompts, step_s)
        if num_alike is None:
            self._loop.at(now + step_s, partial(self._done, scheduled, step_s))
            return
        growth_s = num_decoding * self.timing.decode_s_per_context
        growth_s += sum(n * n for n, _ in prompts) * self.timing.prefill_s_per_token_and_context
        leap = Leap(now, step_s, growth_s, num_alike, scheduled, prompts[0] if prompts else None)
        self._leap = leap
        self._loop.at(leap.end_s, partial(self._land, leap, leap.num_steps))

    def _schedule(self, now: float) -> list[tuple[Request, int]]:
        for request in list(self.policy.gives_way(now)):
            self._preempt(request)
        plan = self.policy.plan(now)
        for request in self.policy.held:
            if request.held_since_s is None:
                request.held_since_s = now
        self.policy.order_running()
        budget = self.shape.max_num_batched_tokens
        scheduled: list[tuple[Request, int]] = []
        self._has_preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            count = min(request.num_tokens - request.num_computed, budget)
            while not self._grow(request, count):
                victim = self.policy.victim()
                place = self.running.index(victim)
                if place < index:
                    index -= 1
                    budget += next((n for r, n in scheduled if r is victim), 0)
                    scheduled = [(r, n) for r, n in scheduled if r is not victim]
                self._preempt(victim)
                if victim is request:
                    break
            else:
                scheduled.append((request, count))
                budget -= count
                index += 1
                continue
            break
        self.stuck = None
        if not self._has_preempted:
            self._place(plan, budget, scheduled, now)
        return scheduled

    def _place(self, plan: Iterable[Request], budget: int, scheduled: list[tuple[Request, int]], now: float) -> None:
        """Let those start who fit with their whole prompt, one after the other until one does not."""
        size, pool = self.shape.block_size, self.pool
        for request in (*self.loaded, *plan):
            if budget <= 0 or len(self.running) >= self.shape.max_num_seqs:
                return
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
                    return
                if further and further + idle > pool.num_free - self.promised_blocks():
                    return
                self.stuck = None
                pool.touch(hits)
                request.blocks = hits
                request.num_computed = len(hits) * size
                if further:
                    self._load(request, further, now)
                    continue
                self._leave_queue(request, now)
            count = min(request.num_tokens - request.num_computed, budget)
            if not self._grow(request, count):
                self.stuck = request
                return
            self.loaded.pop(request, None)
            self.running.append(request)
            scheduled.append((request, count))
            budget -= count

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
            of_prompt = keys[: max(0, request.prompt_tokens // size - first)]
            self.recomputed_tokens += size * len(self._computed.intersection(of_prompt))
            self._computed.update(keys)
        request.service_tokens += count
        if before < request.prompt_tokens:
            self.computed_tokens += min(done, request.prompt_tokens) - before
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_computed = 0
        request.is_preempted = True
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._has_preempted = True
        self.preempted[request] = None
        self.policy.preempted(request, self._loop.now)

    def _release(self, request: Request) -> None:
        owner, num_stem = self.policy.owner(request)
        self.pool.release(request.blocks, owner, num_stem)
        request.blocks = []

    def _done(self, scheduled: list[tuple[Request, int]], step_s: float) -> None:
        """A step is over."""
        now = self._loop.now
        prefill = context = num_decoding = 0
        for request, count in scheduled:
            if count == 1:
                num_decoding += 1
            else:
                prefill += count
                context += count * (request.num_computed + count // 2)
            request.num_computed += count
        self._note(now - step_s, now, prefill, num_decoding)
        self.policy.stepped(step_s, prefill, context / prefill if prefill else 0.0, 1)
        if self.tiers is not None:
            self.tiers.stepped()
        for request, _ in scheduled:
            if request.num_computed == request.num_tokens:
                self._sampled(request, 1, now)
        self._step()

    def _land(self, leap: Leap, num_steps: int) -> None:
        """The last step of a leap is over, unless it was cut shorter meanwhile."""
        if leap is not self._leap or num_steps != leap.num_steps:
            return
        self._leap = None
        now = self._loop.now
        if leap.prompt is None:
            self._note(leap.start_s, now, 0, len(leap.scheduled))
            self.policy.stepped((now - leap.start_s) / num_steps, 0, 0.0, num_steps)
        else:
            count, before = leap.prompt
            self._note(leap.start_s, now, num_steps * count, len(leap.scheduled) - 1)
            for i in range(num_steps):
                self.policy.stepped(leap.step_s(i), count, before + i * count + count // 2, 1)
        self._offer_leap(leap.scheduled, num_steps)
        for request, count in leap.scheduled:
            request.num_computed += count  # its blocks are there already
            if num_steps > 1:
                has_room = self._grow(request, count * (num_steps - 1))
                assert has_room, "a leap is no longer than there is room for"
                request.num_computed += count * (num_steps - 1)
        for request, count in leap.scheduled:
            if count == 1:
                self._sampled(request, num_steps, now)
        self._step()

    def _offer_leap(self, scheduled: list[tuple[Request, int]], num_steps: int) -> None:
        """Tell the tiers of blocks that the steps behind the first filled, in that order; all of them decode."""
        if self.tiers is None:
            return
        size = self.shape.block_size
        full = [
            (end * size - request.num_computed, place, end)
            for place, (request, _) in enumerate(scheduled)
            for end in range((request.num_computed + 1) // size + 1, (request.num_computed + num_steps) // size + 1)
        ]
        for _, place, end in sorted(full):
            self.tiers.scheduled(scheduled[place][0], end)
        self.tiers.stepped()

    def _sampled(self, request: Request, count: int, now: float) -> None:
        request.num_output += count
        request.num_tokens += count
        if request.first_s is None:
            request.first_s = now
            if request.on_first is not None:
                request.on_first()
        if request.output_left == 0:
            self.running.remove(request)
            self._release(request)
            if self.tiers is not None:
                self.tiers.finished(request, (request.num_tokens - 1) // self.shape.block_size)
            self.policy.finish(request, now)
            request.on_done(request)

    def _num_alike(
        self, scheduled: list[tuple[Request, int]], prompts: list[tuple[int, int]], step_s: float
    ) -> int | None:
        """How many steps like the one just scheduled can follow each other, it included, without a decision.

        None: it is the only one, and more than decoding happens in it.
        """
        if not prompts and len(scheduled) == len(self.running):
            count = self._num_decodes(scheduled)
        elif self.tiers is None and not self._has_preempted:  # tiers are offered what each step fills
            count = self._num_chunks(scheduled, prompts)
            if count is None:
                return None
        else:
            return None
        if self.policy.replan_s is not None and (self.waiting or self.preempted):
            count = min(count, max(1, int(self.policy.replan_s / step_s)))
        size = self.shape.block_size
        while count > 1:
            missing = sum(-(-(r.num_computed + n * count) // size) - len(r.blocks) for r, n in scheduled)
            if missing <= self.pool.num_free:
                break
            count //= 2
        return None if prompts and count < 2 else count

    def _num_decodes(self, scheduled: list[tuple[Request, int]]) -> int:
        return 1 if self._has_preempted else min(request.output_left for request, _ in scheduled)

    def _num_chunks(self, scheduled: list[tuple[Request, int]], prompts: list[tuple[int, int]]) -> int | None:
        """Steps that one long prompt fills, whatever else decodes. None: this is no such step, or the only one."""
        if len(prompts) != 1 or prompts[0][0] == 1:
            return None
        if sum(n for _, n in scheduled) < self.shape.max_num_batched_tokens:
            return None
        lengths = [r.output_left if n == 1 else (r.num_tokens - r.num_computed - 1) // n for r, n in scheduled]
        return min(lengths)

    def _note(self, start_s: float, end_s: float, prefill: int, num_decoding: int) -> None:
        self.busy_s += end_s - start_s
        if self.on_step is not None:
            self.on_step(Step(start_s, end_s, prefill, num_decoding))
