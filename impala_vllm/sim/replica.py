"""One engine in virtual time: what its scheduler puts into a step takes as long as `Timing` says.

A step is scheduled, takes its time, and then its tokens are there. Steps that are alike, because all only decode or
one long prompt takes what the others leave, are one leap, which an arrival cuts short at a step's end.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from impala_vllm.sim.charge import FREE, Charge
from impala_vllm.sim.leap import Leap
from impala_vllm.sim.loop import Loop
from impala_vllm.sim.policy import Policy
from impala_vllm.sim.pool import Pool
from impala_vllm.sim.request import Request
from impala_vllm.sim.scheduler import Scheduler, Shape
from impala_vllm.sim.timing import Timing

IDLE_S, IDLE_SHARE = 0.01, 0.02
"""Nothing runs and nobody may start: asked again after so long, or in this share of what policy plans ahead."""

LOADING_S = 1.0
"""The same where only a load can change anything: its end wakes the replica."""


class Step(NamedTuple):
    """A step, or several alike."""

    start_s: float
    end_s: float
    prompt_tokens: int
    """Of all of them."""
    num_decoding: int
    """In each."""


class Replica(Scheduler):
    """Requests come in by `arrive` and leave by their `on_done`."""

    def __init__(
        self,
        loop: Loop,
        timing: Timing,
        shape: Shape,
        policy: Callable[["Replica"], Policy],
        computed: set[int],
        charge: Charge = FREE,
    ) -> None:
        """`computed` holds the keys of all blocks that any replica of the run has computed."""
        super().__init__(shape, computed)
        self.timing = timing
        self.policy = policy(self)
        self.pool = Pool(shape.num_blocks, self.policy.idle)
        self.tiers = self.policy.tiers(loop, shape.below) if shape.below is not None else None
        if self.tiers is not None:
            self.tiers.on_arrival = self._notice
        self.busy_s = 0.0
        self.on_step: Callable[[Step], None] | None = None
        """Told of every step or leap when it is over."""
        self._loop = loop
        self._charge = charge
        self._charged_tokens = 0
        """Of `found_tokens`."""
        self._leap: Leap | None = None
        self._is_awake = False
        self._num_naps = 0

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
        num_found, self._charged_tokens = self.found_tokens - self._charged_tokens, self.found_tokens
        step_s = self.timing.step_s(prompts, num_decoding, context) + self._charge.step(
            sum(n for n, _ in prompts), num_found, bool(self.waiting or self.preempted), self.tiers is not None
        )
        is_dearer = num_found > 0 and self._charge.found_token_s > 0  # than those that follow
        num_alike = None if is_dearer else self._num_alike(scheduled, prompts, step_s)
        if num_alike is None:
            self._loop.at(now + step_s, partial(self._done, scheduled, step_s))
            return
        growth_s = num_decoding * self.timing.decode_s_per_context
        growth_s += sum(n * n for n, _ in prompts) * self.timing.prefill_s_per_token_and_context
        leap = Leap(now, step_s, growth_s, num_alike, scheduled, prompts[0] if prompts else None)
        self._leap = leap
        self._loop.at(leap.end_s, partial(self._land, leap, leap.num_steps))

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
        if self.policy.reorder_s is not None and len(scheduled) < len(self.running):
            count = min(count, max(1, int(self.policy.reorder_s / step_s)))
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
