"""Trace identity online: arrivals and finishes in, links out.

Keeps the open requests, the trace table and one prefix index a namespace, within bounds. Which trace
a request belongs to is decided on the ladder (`ladder`); this file carries the decision out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from impala_vllm.core.identity.chain import Chain
from impala_vllm.core.identity.config import IdentityConfig
from impala_vllm.core.identity.index import Match, PrefixIndex
from impala_vllm.core.identity.ladder import NUM_STEM_STARTS, Rung, climb
from impala_vllm.core.identity.parentage import SURE_TURNS, Parentage
from impala_vllm.core.traces import Trace, TraceTable
from impala_vllm.core.types import Arrival, BlockHash, Finish, Link, Namespace, Outcome, RequestId, Source, TraceId

MAX_CHAINS = 8
"""Conversations remembered a trace: more roles than the largest multi-agent stack measured (5)."""
_INFERRED = frozenset(Source) - {Source.EXPLICIT, Source.FORK}
"""Sources that say nothing about a parent themselves."""


@dataclass(slots=True)
class Stats:
    """What identity has done so far."""

    links: Counter[Source] = field(default_factory=Counter[Source])
    expired_traces: int = 0
    evicted_traces: int = 0
    forgotten_blocks: int = 0
    splits: int = 0
    """Compactions that turned out to be none."""


@dataclass(slots=True)
class _Open:
    link: Link
    chain: Chain
    num_tokens: int


class Identity:
    """Answers "whose turn is this" for every arrival. Deterministic; a clock is never read."""

    def __init__(self, config: IdentityConfig) -> None:
        self.config = config
        self.traces = TraceTable()
        self.stats = Stats()
        self._indexes: dict[Namespace, PrefixIndex[Chain]] = {}
        self._sessions: dict[tuple[Namespace, str], Trace] = {}
        self._open: dict[RequestId, _Open] = {}
        self._parentage = Parentage(config.subagent_window_s)
        self._num_started = 0
        self.on_forget: Callable[[TraceId], None] | None = None
        """Told of every trace that leaves the table."""
        self.num_blocks = 0
        """Block hashes indexed over all namespaces."""

    def arrive(self, arrival: Arrival, now: float) -> Link:
        """Link a request that just arrived. A request id that is still open gets its first answer again."""
        again = self._open.get(arrival.request_id)
        if again is not None:
            return again.link
        self.tick(now)
        index = self._index(arrival.namespace)
        rung = climb(arrival, now, index, self.traces, self._sessions, self.config)
        trace = rung.trace or self._start(arrival, rung, index, now)
        trace.num_turns += 1
        if rung.chain is not None and rung.source in (Source.CONTINUATION, Source.RETRY):
            self._split(trace, rung.chain.era, now)
        if rung.source in _INFERRED:
            self._reconsider(trace)
        link = Link(
            trace.trace_id,
            trace.parent_trace_id,
            Source.SUBAGENT if rung.source is Source.NEW and trace.parent_trace_id else rung.source,
            rung.confidence,
            rung.matched.depth,
            rung.chain.request_id if rung.chain else (trace.last_request_id if rung.trace else None),
            rung.chain.prompt_tokens if rung.chain else 0,
            rung.chain.tokens if rung.chain else 0,
        )
        chain = self._chain(rung, trace, len(arrival.blocks))
        self._move(chain, arrival.blocks)
        chain.prompt_depth, chain.prompt_tokens = len(arrival.blocks), arrival.num_tokens
        chain.tokens, chain.ending = arrival.num_tokens, arrival.ending
        chain.request_id, chain.running, chain.last_s = arrival.request_id, True, now
        trace.last_request_id = arrival.request_id
        trace.num_running += 1
        trace.num_tokens = arrival.num_tokens
        trace.source, trace.confidence = link.source, link.confidence
        self.traces.touch(trace, now)
        self._open[arrival.request_id] = _Open(link, chain, arrival.num_tokens)
        self.stats.links[link.source] += 1
        self._shrink()
        return link

    def finish(self, finish: Finish, now: float) -> None:
        """Note a turn's end and index its output. Unknown or finished requests change nothing."""
        done = self._open.pop(finish.request_id, None)
        if done is None:
            return
        chain, trace = done.chain, done.chain.trace
        trace.num_running -= 1
        trace.num_tokens = finish.num_tokens
        trace.last_finish_s, trace.last_outcome = now, finish.outcome
        if chain.request_id == finish.request_id:
            chain.running, chain.last_s, chain.tokens = False, now, finish.num_tokens
            if finish.outcome not in (Outcome.ABORT, Outcome.ERROR) and len(finish.blocks) > chain.tip.depth:
                self._move(chain, finish.blocks)
        self._parentage.note_end(trace, now)
        self.traces.touch(trace, now)
        self._shrink()

    def shared_depth(self, request_id: RequestId) -> int:
        """Leading blocks that an open request's chain shares with another trace that is alive. O(log n)."""
        found = self._open.get(request_id)
        if found is None or found.chain.tip.run is None:
            return 0
        tip = found.chain.tip
        index = self._index(found.chain.trace.namespace)
        near = islice(index.near(Match(tip.depth, tip.run), 4), 8)
        others = (s.depth for s in near if s.tip.owner.trace is not found.chain.trace)
        return max(others, default=0)

    def tick(self, now: float) -> None:
        """End the lease of traces silent for `lease_s`. O(expired)."""
        horizon = now - self.config.lease_s
        while True:
            oldest = next(iter(self.traces), None)
            if oldest is None or oldest.last_event_s > horizon:
                return
            if oldest.num_running:  # an open request keeps the trace: look again in a lease's time
                self.traces.touch(oldest, now)
                continue
            self._forget(oldest)
            self.stats.expired_traces += 1

    def check_invariants(self) -> None:
        """Raise AssertionError if table, chains and indexes disagree. O(n), for tests."""
        for index in self._indexes.values():
            index.check_invariants()
        assert self.num_blocks == sum(len(index) for index in self._indexes.values())
        running: Counter[TraceId] = Counter(o.chain.trace.trace_id for o in self._open.values())
        for trace in self.traces:
            assert trace.num_running == running[trace.trace_id]
            assert len(trace.chains) <= max(MAX_CHAINS, trace.num_running)
            assert all(chain.trace is trace for chain in trace.chains)
            for child in trace.children:
                found = self.traces.get(child)
                assert found is not None
                assert found.parent_trace_id == trace.trace_id
        for (namespace, name), trace in self._sessions.items():
            assert self.traces.get(trace.trace_id) is trace
            assert (trace.namespace, trace.session_id) == (namespace, name)

    def _start(self, arrival: Arrival, rung: Rung, index: PrefixIndex[Chain], now: float) -> Trace:
        self._num_started += 1
        trace = Trace(TraceId(f"t{self._num_started}"), arrival.namespace, arrival.request_id, now)
        self.traces.add(trace)
        stem = index.stem_depth(rung.matched)
        if rung.source is Source.NEW:
            trace.opening = arrival.blocks[stem - 1] if stem else None
            trace.suspects = self._parentage.suspects(arrival.namespace, now, self.traces)
        else:
            self.traces.adopt(trace, rung.parent)
        index.note_start(rung.matched)
        if arrival.session_id is not None:
            trace.session_id = arrival.session_id
            self._sessions[arrival.namespace, arrival.session_id] = trace
        return trace

    def _split(self, trace: Trace, era: int, now: float) -> None:
        """Undo a compaction that was none: a history that was believed rewritten goes on as it was.

        What came after the rewriting becomes a trace of its own from here on.
        """
        later = [chain for chain in trace.chains if chain.era > era]
        if not later:
            return
        self._num_started += 1
        other = Trace(TraceId(f"t{self._num_started}"), trace.namespace, later[0].request_id or RequestId(""), now)
        other.chains = later
        other.source, other.confidence = Source.NEW, trace.confidence
        other.last_request_id = later[-1].request_id or other.first_request_id
        other.num_turns = len(later)
        other.num_tokens = later[-1].tokens
        other.num_running = sum(done.chain in later for done in self._open.values())
        trace.num_running -= other.num_running
        trace.chains = [chain for chain in trace.chains if chain.era <= era]
        for chain in later:
            chain.trace = other
        self.traces.add(other)
        self.stats.splits += 1

    def _reconsider(self, trace: Trace) -> None:
        """See again who the trace's parent may be, as long as that is open."""
        if trace.suspects or trace.num_turns == SURE_TURNS:
            parent = self._parentage.parent(trace, self.traces)
            self.traces.adopt(trace, parent)
            self._parentage.learn(trace)

    def _chain(self, rung: Rung, trace: Trace, depth: int) -> Chain:
        """The conversation the request goes on with: the one it follows, or another one beside it."""
        if rung.chain is not None and rung.extends:
            chain = rung.chain
            trace.chains.remove(chain)
        else:
            before = rung.chain if rung.chain is not None and rung.trace is trace else None
            era = 0 if before is None else before.era + (rung.source is Source.COMPACTION)
            chain = Chain(trace, depth if before is None else min(depth, before.opening), era)
        trace.chains.append(chain)
        if len(trace.chains) > MAX_CHAINS:
            for stale in [c for c in trace.chains if not c.running][: len(trace.chains) - MAX_CHAINS]:
                self._move(stale, ())
                trace.chains.remove(stale)
        return chain

    def _shrink(self) -> None:
        while len(self.traces) > self.config.max_traces or self.num_blocks > self.config.max_blocks:
            victim = next(self.traces.idle(), None)
            if victim is None:
                return
            self.stats.forgotten_blocks += self._forget(victim)
            self.stats.evicted_traces += 1

    def _forget(self, trace: Trace) -> int:
        """Drop a trace with its chains; the number of blocks that go with it."""
        before = self.num_blocks
        for chain in trace.chains:
            self._move(chain, ())
        if trace.session_id is not None:
            self._sessions.pop((trace.namespace, trace.session_id), None)
        self.traces.remove(trace)
        if self.on_forget is not None:
            self.on_forget(trace.trace_id)
        return before - self.num_blocks

    def _move(self, chain: Chain, blocks: Sequence[BlockHash]) -> None:
        """End the chain at the end of `blocks`; no blocks: forget it."""
        namespace = chain.trace.namespace
        index = self._index(namespace)
        before = len(index)
        index.move(chain.tip, blocks)
        self.num_blocks += len(index) - before
        if not len(index):
            del self._indexes[namespace]

    def _index(self, namespace: Namespace) -> PrefixIndex[Chain]:
        index = self._indexes.get(namespace)
        if index is None:
            index = self._indexes[namespace] = PrefixIndex(NUM_STEM_STARTS)
        return index
