"""Steers the tiers by trace: whose chunks are whose, what a waiting turn loads, what goes on to NVMe.

Between the enforcer, which speaks of requests and traces, and the manager, which speaks of chunks. With several KV
cache groups there is no such thing yet: the manager then is a plain cache.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata

from impala_vllm.adapters.vllm.tiers.manager import TierManager
from impala_vllm.adapters.vllm.tiers.names import Names
from impala_vllm.adapters.vllm.tiers.nvme import WINDOW_S, NvmeTier
from impala_vllm.adapters.vllm.tiers.turns import Turn
from impala_vllm.core.admission import MAX_PASSED
from impala_vllm.core.allocator import Key
from impala_vllm.core.planner import NOTHING, Below, Planner, PlannerConfig, Queue
from impala_vllm.core.reach import below, leading
from impala_vllm.core.traces import Trace
from impala_vllm.core.types import Outcome, TraceId

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from impala_vllm.core.admission import Asking
    from impala_vllm.core.cost import StepCost


MAX_CHOSEN = 8
"""Turns at the head of the queue whose way is chosen anew each step: tiers change while they wait."""


class Reach(NamedTuple):
    """What a waiting turn need not compute."""

    tokens: int
    """Leading tokens in HBM or worth loading."""
    load_s: float


class TierPolicy:
    """Attached to a scheduler whose connector holds a TierManager; `of` finds out."""

    def __init__(self, scheduler: "Scheduler", manager: TierManager, cost: "StepCost", config: PlannerConfig) -> None:
        self.manager = manager
        self._cost = cost
        self._scheduler = scheduler
        self.planner = Planner(cost, manager.chunk_bytes / manager.tokens_per_chunk, config)
        self._block_tokens = scheduler.block_size
        self._chunk_blocks = max(1, manager.tokens_per_chunk // scheduler.block_size)
        self._num_workers = scheduler.vllm_config.parallel_config.world_size
        if scheduler.vllm_config.lora_config is not None:
            manager.writes_unasked = False  # nobody would look at the adapter
        group = scheduler.kv_cache_config.prefix_cacheable_group_ids[0]
        self._names = Names(manager.tokens_per_chunk // scheduler.hash_block_size, group)

    @classmethod
    def of(cls, scheduler: "Scheduler", cost: "StepCost", config: PlannerConfig) -> "TierPolicy | None":
        """None where there are no tiers of ours, or several KV cache groups."""
        manager = tier_manager(scheduler)
        if manager is None or len(scheduler.kv_cache_config.kv_cache_groups) != 1:
            return None
        return cls(scheduler, manager, cost, config)

    def arrive(self, request: "Request", trace: Trace | None, stem_blocks: int) -> None:
        """`request` is about to be queued, a turn of `trace`. O(its chunks)."""
        if request.request_id in self.manager.turns.left_out:
            return
        stem = stem_blocks // self._chunk_blocks
        writes: bool | None = False
        trace_id = None
        if trace is not None:
            trace_id = trace.trace_id
            writes = _may_outlive(request) and self.planner.writes(trace.num_turns, trace.opening)
            if trace.num_turns == 1:
                self.manager.one_shots.began(trace_id)
            else:
                self.manager.one_shots.came_back(trace_id)
            if trace.num_turns == 2 and trace.last_outcome is not None:
                self.planner.resumed(trace.opening, trace.last_outcome)
        before = self.manager.turns.keys_of(trace_id) if trace_id is not None else ()
        known = self._names.same(request, before)
        self.manager.arrive(request.request_id, trace_id, self._names.all(request, before[:known]), stem, bool(writes))
        turn = self.manager.turns.open(request.request_id)
        turn.known_chunks = known
        if trace is not None and writes is None and self.manager.nvme is not None:
            # Others of its kind may tell while it waits and runs.
            turn.may_write = partial(self.planner.writes, trace.num_turns, trace.opening)
            self.manager.turns.undecided.add(trace.trace_id)

    def reach(self, request: "Request", hbm_blocks: int) -> Reach:
        """How far the turn gets without computing, with `hbm_blocks` in HBM; decides what it waits for."""
        hbm_tokens = hbm_blocks * self._block_tokens
        turn = self.manager.turns.get(request.request_id)
        if turn is None:
            return Reach(hbm_tokens, 0.0)
        turn.hbm_tokens = hbm_tokens
        if turn.known_chunks:
            self._count_resume(turn)
        return self._choose(turn, request.num_tokens)

    def load(self, asks: "Sequence[Asking]", now: float) -> list["Asking"]:
        """Start reads from NVMe for these waiting turns, best first. Returns those that may run now.

        Turns whose chunks are still to be read may not: they would compute what is about to arrive.
        """
        self.manager.host_pays = self.planner.host_pays()
        nvme = self.manager.nvme
        if nvme is None:
            return list(asks)
        ready: list[Asking] = []
        before: set[TraceId] = set()
        turns = [self.manager.turns.get(ask.turn.request_id) for ask in asks]
        num_reading = sum(turn is not None and turn.nvme_tokens > 0 for turn in turns)
        num_computing = len(asks) + len(self._scheduler.running) - num_reading
        compute_s, nvme_tokens, num_passed = 0.0, 0, 0
        room = self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        for index, (ask, turn) in enumerate(zip(asks, turns, strict=True)):
            if num_passed > MAX_PASSED:
                return ready + list(asks[index:])  # admission looks no further either
            is_ready = turn is None
            if turn is not None:
                is_reading = turn.nvme_tokens > 0
                num_reading -= is_reading
                num_computing -= not is_reading
                turn.queue = Queue(compute_s, nvme_tokens, num_computing, num_reading)
                if index < MAX_CHOSEN:
                    self._choose(turn, ask.turn.prompt_tokens)
                is_ready = self._is_ready(nvme, turn, before, now)
                if turn.trace_id is not None:
                    before.add(turn.trace_id)
                compute_s += self._cost.prefill_s(ask.turn.prompt_tokens, ask.turn.reach_tokens)
                nvme_tokens += turn.nvme_tokens
            if is_ready:
                ready.append(ask)
                needed = ask.new_blocks + ask.own_idle_blocks
                if needed <= room:
                    room -= needed
                else:
                    num_passed += 1
        return ready

    def is_loading(self, now: float) -> bool:
        """A waiting turn's KV may be on its way from NVMe."""
        return self.manager.nvme is not None and self.manager.nvme.is_busy(now)

    def finish(self, request: "Request", trace: Trace | None, stem_blocks: int, outcome: Outcome, now: float) -> None:
        """`request` has ended. `trace` None: nobody's, or forgotten meanwhile."""
        turn = self.manager.turns.get(request.request_id)
        if turn is None or request.request_id in self.manager.turns.left_out:
            return
        writes = False
        if trace is not None:
            writes = self.planner.ended(trace.num_turns, trace.opening, outcome, bool(turn.writes), now)
            writes = writes and _may_outlive(request)
        keys = self._names.all(request, turn.keys[: self._names.same(request, turn.keys)])
        self.manager.finish(request.request_id, keys, stem_blocks // self._chunk_blocks, writes)

    def moved(self, output: "KVConnectorOutput") -> None:
        """The workers' account of a step: how long loads from host took."""
        meta = output.kv_connector_worker_meta
        if isinstance(meta, OffloadingWorkerMetadata):
            self.manager.loads.took(meta.transfer_stats.load.time / self._num_workers)

    def below(self, trace_id: TraceId) -> Below:
        """What tiers below HBM hold of the trace's newest turn. O(chunks that came), or all they hold if any went."""
        turns = self.manager.turns
        keys = turns.keys_of(trace_id)
        if not keys:
            return NOTHING
        found = turns.below[trace_id] = self._below(keys, 0, turns.below.get(trace_id, NOTHING))
        return found

    def _choose(self, turn: Turn, prompt_tokens: int) -> Reach:
        per_chunk = self.manager.tokens_per_chunk
        start = turn.hbm_tokens // per_chunk
        found = self._below(turn.keys, start)
        if turn.skips_nvme:
            found = Below(found.host_tokens)
        queue, behind = turn.queue, start + found.host_tokens // per_chunk
        if found.nvme_tokens and behind < turn.asked_chunks and self._is_reading(turn.keys[behind]):
            queue = queue._replace(coming_tokens=(turn.asked_chunks - behind) * per_chunk)
        # The last token is always computed.
        way = self.planner.way(prompt_tokens - 1, turn.hbm_tokens, found, queue)
        loaded = way.host_tokens + way.nvme_tokens
        turn.awaited_chunks, turn.nvme_tokens = start + loaded // per_chunk, way.nvme_tokens
        reach = min(max(turn.hbm_tokens, turn.awaited_chunks * per_chunk), prompt_tokens - 1)
        return Reach(reach, self.planner.load_s(way.host_tokens, way.nvme_tokens) if loaded else 0.0)

    def _is_ready(self, nvme: NvmeTier, turn: Turn, ahead: set[TraceId], now: float) -> bool:
        keys, host = turn.keys, self.manager.host.pool.ready
        # What HBM has may be in no tier: begin behind it.
        start = turn.hbm_tokens // self.manager.tokens_per_chunk
        has_come = turn.awaited_chunks <= start or (keys[start] in host and keys[turn.awaited_chunks - 1] in host)
        behind = turn.awaited_chunks if has_come else leading(keys, host.__contains__, start)
        if behind >= turn.awaited_chunks or turn.skips_nvme:
            return True
        key = keys[behind]
        if nvme.is_reading(key):
            turn.skips_nvme = nvme.is_late(key, now)
            return turn.skips_nvme
        here = nvme.here
        if key not in here:
            return True
        if nvme.queued_s() > WINDOW_S:
            # Behind reads that are all overdue nobody knows how long it takes.
            turn.skips_nvme = not nvme.is_busy(now)
            return turn.skips_nvme
        wanted = keys[behind : leading(keys, here.__contains__, behind)]
        if not nvme.promote(wanted, turn.trace_id, now, turn.own_keys().get, ahead):
            # With nobody before it and nothing on its way there will be no more room than now.
            turn.skips_nvme = not ahead and not nvme.is_busy(now)
        else:
            turn.asked_chunks = behind + len(wanted)
        return turn.skips_nvme

    def _is_reading(self, key: Key) -> bool:
        return self.manager.nvme is not None and self.manager.nvme.is_reading(key)

    def _below(self, keys: Sequence[Key], start: int, known: Below = NOTHING) -> Below:
        nvme = self.manager.nvme
        if not keys:
            return NOTHING
        here = nvme.here if nvme is not None else ()
        if not here:
            known = Below(known.host_tokens)
        host = self.manager.host.pool.ready
        return below(keys, start, self.manager.tokens_per_chunk, host.__contains__, here.__contains__, known)

    def _count_resume(self, turn: Turn) -> None:
        """Once a turn, as it is first looked at: where is what its trace had?"""
        known, turn.known_chunks = turn.known_chunks, 0
        self.manager.num_resumes += 1
        in_hbm = turn.hbm_tokens // self.manager.tokens_per_chunk
        found = leading(turn.keys, self.manager.host.pool.ready.__contains__, min(in_hbm, known))
        self.manager.num_resumes_found += found >= known


def tier_manager(scheduler: "Scheduler") -> TierManager | None:
    """Our manager behind the scheduler's connector; None where there is another, or none."""
    side = getattr(scheduler.connector, "connector_scheduler", None)
    manager = getattr(side, "manager", None)
    return manager if isinstance(manager, TierManager) else None


def _may_outlive(request: "Request") -> bool:
    """Does its KV mean the same after a restart? vLLM's hashes know an adapter's name, not its weights."""
    return request.lora_request is None
