"""Tells the ledger's book what vLLM's scheduler does with requests. Runs on the engine loop's thread.

Token counts are vLLM's own: the prefill statistics it sends to its metrics, and a request's output tokens. So sums over
a ledger equal `vllm:prompt_tokens_by_source_total` and `vllm:generation_tokens_total`.
"""

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from impala_vllm import __version__
from impala_vllm.adapters.vllm import facts
from impala_vllm.adapters.vllm.tiers.policy import tier_manager
from impala_vllm.config import Config
from impala_vllm.core.traces import Trace, TraceTable
from impala_vllm.core.types import Link, TraceId
from impala_vllm.insight.ledger import Book, Header, Writer
from impala_vllm.insight.ledger.account import Turn
from impala_vllm.insight.ledger.book import Served
from impala_vllm.insight.ledger.record import Phase, Tokens, digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.metrics.stats import PrefillStats
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.impala")

_TIERS = {"host": "host", "disk": "nvme"}
"""vLLM's names of where a hit came from, as the ledger's; all others: other."""
_NOBODY: frozenset[str] = frozenset()


class Bookkeeper:
    """The scheduler's hooks call it, in the order of their names in a step."""

    def __init__(self, scheduler: "Scheduler", book: Book, clock: Callable[[], float]) -> None:
        self.book = book
        self.writer: Writer | None = None
        self.spent_ns = 0
        self._scheduler = scheduler
        self._clock = clock
        self._num_gpus = scheduler.vllm_config.parallel_config.world_size
        self._hash_block, self._block = scheduler.hash_block_size, scheduler.block_size
        self._stats: dict[str, PrefillStats | None] = {}
        """Of every open request: vLLM takes them off the request when it reports them."""
        self._sources: dict[str, dict[Any, int]] = {}
        """Where loaded tokens come from, by request."""
        self._loading: set[str] = set()
        self._held: frozenset[str] = _NOBODY
        self._fetching: frozenset[str] = _NOBODY
        self._steps: deque[tuple[int, float]] = deque(maxlen=64)
        self._stepped_s = 0.0

    @classmethod
    def of(cls, scheduler: "Scheduler", config: Config, clock: Callable[[], float]) -> "Bookkeeper | None":
        """None where no ledger is asked for. Starts the writer's thread."""
        if config.ledger.path is None:
            return None
        header = _header(scheduler, config)
        on_final = None
        if config.ledger.otlp_endpoint is not None:
            from impala_vllm.insight.ledger.spans import Spans

            on_final = Spans.to(config.ledger.otlp_endpoint)
        path = _path(Path(config.ledger.path).expanduser().absolute(), header.rank)
        writer = Writer(path, header, int(config.ledger.max_mib * (1 << 20)), config.ledger.keep, on_final)
        keeper = cls(scheduler, Book(header.run, time.time() - clock(), writer.put), clock)
        keeper.writer = writer
        return keeper

    def arrive(self, request: "Request", link: Link | None, trace: Trace | None) -> None:
        """`request` is about to be queued."""
        known = link.matched_blocks * self._hash_block if link is not None else 0
        now = self._clock()
        self.book.arrive(request.request_id, facts.turn_id(request), trace, link, known, now)
        self._stats[request.request_id] = request.prefill_stats

    def scheduled(self, output: "SchedulerOutput", held: frozenset[str], fetching: frozenset[str]) -> None:
        """A step was built. `held` by admission; `fetching`: their KV is read from NVMe."""
        now = self._clock()
        started = [new.req_id for new in output.scheduled_new_reqs]
        started += output.scheduled_cached_reqs.resumed_req_ids
        if held is not self._held or fetching is not self._fetching:
            self._keep_back(held, fetching, now)
        holding = self._scheduler.kv_holding_waiting
        if self._loading or len(holding):
            self._load({request.request_id for request in holding}, now)
        for request_id in started:
            turn, request = self.book.get(request_id), self._scheduler.requests.get(request_id)
            if turn is None or request is None:
                continue
            self._note_sources(request)
            before = request.num_computed_tokens - output.num_scheduled_tokens.get(request_id, 0)
            self.book.start(turn, before, request.num_output_tokens, now)
        if output.total_num_scheduled_tokens:
            self._steps.append((id(output), now))

    def stepping(self, output: "SchedulerOutput") -> None:
        """A step's output is here, and nothing has been done about it yet. Steps overlap: one takes from the end of
        the one before."""
        now = self._clock()
        while self._steps and output.total_num_scheduled_tokens:
            number, started_s = self._steps.popleft()
            if number == id(output):
                tokens = output.num_scheduled_tokens
                prefill = {name: tokens[name] for name in self.book.prefilling() if name in tokens}
                device_s = (now - max(started_s, self._stepped_s)) * self._num_gpus
                self.book.step(device_s, prefill, output.total_num_scheduled_tokens)
                break
        self._stepped_s = now

    def stepped(self) -> None:
        """The step is done: some turns have their first token."""
        now = self._clock()
        requests = self._scheduler.requests
        for request_id, turn in list(self.book.prefilling().items()):
            request = requests.get(request_id)
            if request is not None and request.num_output_tokens > turn.outputs_before:
                self.book.move(turn, Phase.DECODE, now)
        self.book.tick(now)

    def preempting(self, request: "Request") -> None:
        """`request` is about to lose its place and what it has computed."""
        turn = self.book.get(request.request_id)
        if turn is not None:
            self.book.preempt(turn, request.num_computed_tokens - request.num_output_placeholders, self._clock())

    def finish(self, request: "Request") -> None:
        """`request` has ended, however it did."""
        stats = self._stats.pop(request.request_id, None)
        sources = self._sources.pop(request.request_id, {})
        tokens = Tokens(output=request.num_output_tokens)
        if stats is not None and request.prefill_stats is None:  # vLLM has counted it too
            tokens.computed = stats.num_computed_tokens
            tokens.hbm = stats.num_local_cached_tokens
            tokens.other = stats.num_external_cached_tokens
            for source, count in sources.items():
                name = _TIERS.get(str(source.value))
                count = min(count, tokens.other)
                if name is not None:
                    setattr(tokens, name, getattr(tokens, name) + count)
                    tokens.other -= count
        reusable = (request.num_prompt_tokens - 1) // self._block * self._block
        served = Served(tokens, max(0, reusable), not request.skip_reading_prefix_cache)
        now = self._clock()
        self.book.finish(request.request_id, served, facts.outcome(request, frozenset()), now)
        if not self._stats:
            self.book.tick(now)  # the engine goes idle: no step will

    def forget(self, trace_id: TraceId) -> None:
        """The trace left the table."""
        self.book.forget(trace_id)

    def report(self, traces: TraceTable, asked: dict[str, Any]) -> int:
        """Note the outcome that a client reports for traces of its own. How many there are. O(traces)."""
        found = [trace for trace in traces if _is_asked(trace, asked)]
        now = self._clock()
        num = sum(self.book.report(trace.trace_id, asked["outcome"], asked.get("score"), now) for trace in found)
        if not self._stats:
            self.book.tick(now)
        return num

    def tick(self) -> None:
        """Make the records that are due. An idle engine takes no steps that would."""
        self.book.tick(self._clock())

    def stats(self) -> dict[str, Any]:
        """Plain data for the snapshot."""
        counts = self.writer.counts if self.writer is not None else None
        return {
            "on": True,
            "spent_s": self.spent_ns / 1e9,
            "uncharged_s": self.book.uncharged_s,
            "records": counts.records if counts else 0,
            "bytes": counts.bytes if counts else 0,
            "dropped": counts.refused + counts.lost if counts else 0,
            "bare": counts.bare if counts else 0,
            "errors": counts.errors if counts else 0,
            "trouble": counts.trouble if counts else None,
        }

    def close(self) -> None:
        """Write what is left and end the writer's thread. Idempotent."""
        if self.writer is not None:
            self.book.close(self._clock())
            self.writer.close()
            self.writer = None

    def _keep_back(self, held: frozenset[str], fetching: frozenset[str], now: float) -> None:
        self._move(self._held - held - fetching, Phase.HOLD, Phase.QUEUE, now)
        self._move(self._fetching - fetching - held, Phase.LOAD, Phase.QUEUE, now)
        self._move(held, None, Phase.HOLD, now)
        self._move(fetching, None, Phase.LOAD, now)
        self._held, self._fetching = held, fetching

    def _move(self, request_ids: frozenset[str], before: Phase | None, after: Phase, now: float) -> None:
        for request_id in request_ids:
            turn = self.book.get(request_id)
            if turn is not None and (turn.phase is before or (before is None and _waits(turn))):
                self.book.move(turn, after, now)

    def _load(self, holding: set[str], now: float) -> None:
        for request_id in holding - self._loading:
            turn, request = self.book.get(request_id), self._scheduler.requests.get(request_id)
            if turn is not None and request is not None and _waits(turn):
                self._note_sources(request)
                self.book.move(turn, Phase.LOAD, now)
        self._loading = holding

    def _note_sources(self, request: "Request") -> None:
        stats = self._stats.get(request.request_id)
        if stats is None or request.prefill_stats is None or not stats.num_external_cached_tokens:
            return
        connector = self._scheduler.connector
        if request.request_id not in self._sources and connector is not None:
            self._sources[request.request_id] = connector.get_external_cache_hit_sources(
                request, stats.num_external_cached_tokens
            )


def _waits(turn: Turn) -> bool:
    return turn.phase in (Phase.QUEUE, Phase.HOLD, Phase.LOAD)


def _is_asked(trace: Trace, asked: dict[str, Any]) -> bool:
    if trace.namespace.tenant != asked["tenant"]:
        return False
    if (session_id := asked.get("session_id")) is not None:
        return trace.session_id == session_id
    if (trace_id := asked.get("trace_id")) is not None:
        return trace.trace_id == trace_id
    return facts.client_id(trace.last_request_id) in (asked["request_id"], f"{asked['request_id']}-0")


def _header(scheduler: "Scheduler", config: Config) -> Header:
    vllm_config: VllmConfig = scheduler.vllm_config
    model = vllm_config.model_config
    manager = tier_manager(scheduler)
    blocks = scheduler.kv_cache_config.num_blocks - 1  # the null block
    host = nvme = 0
    if manager is not None:
        host = manager.host.pool.num_slots * manager.tokens_per_chunk
        nvme = int(manager.stats().get("nvme_size_bytes", 0.0)) // manager.chunk_bytes * manager.tokens_per_chunk
    return Header(
        run=secrets.token_hex(4),
        at=round(time.time(), 3),
        impala=__version__,
        mode=config.mode.value,
        model=digest("model", str(model.model)),
        device=_device(),
        rank=vllm_config.parallel_config.data_parallel_index,
        gpus=vllm_config.parallel_config.world_size,
        block=scheduler.hash_block_size,
        hbm=blocks * scheduler.block_size,
        host=host,
        nvme=nvme,
    )


def _device() -> str:
    """What its driver calls it; a CPU is one as any other. Empty where nothing can be learned."""
    try:
        return str(current_platform.get_device_name())
    except Exception:
        return ""


def _path(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path
