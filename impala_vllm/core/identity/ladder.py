"""The ladder: from what a client says itself down to "new", the first rung that holds.

Answers only; `identity` carries the answer out.
"""

from collections.abc import Mapping
from itertools import islice, takewhile
from typing import NamedTuple

from impala_vllm.core.identity.chain import Chain
from impala_vllm.core.identity.config import IdentityConfig
from impala_vllm.core.identity.index import Match, PrefixIndex, Shared
from impala_vllm.core.traces import Trace, TraceTable
from impala_vllm.core.types import Arrival, Namespace, Source

NUM_STEM_STARTS = 2
"""A block with which this many further traces started is system prompt, not identity."""
HANDOVER_S = 15.0
"""Roles of one program take turns without a pause: the next speaks within about one model call."""
HANDOVER_TOKENS = 128
"""Two tasks may open with the same phrase, not with the same half page."""
EDIT_SHRINK, EDIT_GROWTH = -0.01, 0.02
"""An edited history is about as long as it was. Of 414 recorded sessions' restarts within these bounds and the
window, 81 to 83 were the same trace's and 0 to 6 another's."""
MIN_REWRITTEN_TOKENS = 32_768
"""Nobody rewrites a history that is far from filling a context."""
MAX_CANDIDATES = 32
"""Chains looked at for one arrival. Past the stem a handful share a point; in the stem no number would do."""


class Rung(NamedTuple):
    """A decision. Without a trace a new one starts, below `parent` if there is one."""

    source: Source
    confidence: float
    matched: Match[Chain]
    trace: Trace | None = None
    chain: Chain | None = None
    """The conversation it goes on with or departs from."""
    extends: bool = False
    """Whether it takes the conversation over, rather than opening one beside it."""
    parent: Trace | None = None


def climb(
    arrival: Arrival,
    now: float,
    index: PrefixIndex[Chain],
    traces: TraceTable,
    sessions: Mapping[tuple[Namespace, str], Trace],
    config: IdentityConfig,
) -> Rung:
    """The first rung that holds for the arrival."""
    found = index.match(arrival.blocks)
    if arrival.session_id is not None:
        return _says_so(arrival, arrival.session_id, found, sessions)
    stem = index.stem_depth(found)
    past_stem = list(takewhile(lambda shared: shared.depth > stem, index.near(found, MAX_CANDIDATES)))
    return (
        _goes_on(arrival, found, past_stem)
        or _departs(arrival, now, found, past_stem, stem)
        or _rewrites(arrival, now, found, index, config)
        or Rung(Source.NEW, 0.5, found)
    )


def _says_so(arrival: Arrival, name: str, found: Match[Chain], sessions: Mapping[tuple[Namespace, str], Trace]) -> Rung:
    """What the client sent wins, whatever the blocks say."""
    trace = sessions.get((arrival.namespace, name))
    up = arrival.parent_session_id
    parent = None if up is None else sessions.get((arrival.namespace, up))
    idle = [chain for chain in trace.chains if not chain.running] if trace else []
    chain = idle[-1] if idle else None
    return Rung(Source.EXPLICIT, 1.0, found, trace, chain, extends=chain is not None, parent=parent)


def _goes_on(arrival: Arrival, found: Match[Chain], near: list[Shared[Chain]]) -> Rung | None:
    """Retry and continuation: the whole of a chain's last prompt, but for its last block, comes again.

    What shares only a first prompt with a chain may be the next item for the same instructions: it goes on with it
    where it is longer, and the chain has been answered.
    """
    best: Shared[Chain] | None = None
    for shared in near:
        chain = shared.tip.owner
        if shared.depth < chain.prompt_depth - 1:
            continue
        is_first = chain.prompt_depth <= chain.opening
        if is_first and (chain.running or arrival.num_tokens <= chain.prompt_tokens) and not _again(arrival, shared):
            continue
        if best is None or (chain.prompt_depth, chain.last_s) > (best.tip.owner.prompt_depth, best.tip.owner.last_s):
            best = shared
    if best is None:
        return None
    chain = best.tip.owner
    source = Source.RETRY if chain.running and _again(arrival, best) else Source.CONTINUATION
    return Rung(source, 0.9, found, chain.trace, chain, extends=True)


def _again(arrival: Arrival, shared: Shared[Chain]) -> bool:
    """Is it the chain's last prompt, token for token as far as can be told?"""
    chain = shared.tip.owner
    same_length = chain.prompt_depth == len(arrival.blocks) and chain.prompt_tokens == arrival.num_tokens
    same_end = arrival.ending == chain.ending or not arrival.ending or not chain.ending
    return same_length and same_end and shared.depth >= chain.prompt_depth


def _departs(arrival: Arrival, now: float, found: Match[Chain], near: list[Shared[Chain]], stem: int) -> Rung | None:
    """Rollback and fork: it follows a chain past the stem, then leaves it.

    Past the chain's first prompt that is its own history. Inside the first prompt it may be another task
    that opens alike, unless the stem is known and it looks like the next version of a role's prompt: the
    chain never went on, or its trace spoke just now and much more than the stem is the same.
    """
    for shared in near:
        chain, trace = shared.tip.owner, shared.tip.owner.trace
        if shared.depth < found.depth:
            break
        if shared.depth > chain.opening:
            if chain.running:
                return Rung(Source.FORK, 0.7, found, chain=chain, parent=trace)
            return Rung(Source.ROLLBACK, 0.8, found, trace, chain)
        if stem == 0 or chain.running:
            continue
        past_stem_tokens = (shared.depth - stem) * arrival.num_tokens / len(arrival.blocks)
        handed_over = (
            not trace.num_running and now - trace.last_event_s <= HANDOVER_S and past_stem_tokens >= HANDOVER_TOKENS
        )
        if handed_over or chain.prompt_depth <= chain.opening:
            return Rung(Source.ROLLBACK, 0.7, found, trace, chain)
    return None


def _rewrites(
    arrival: Arrival, now: float, found: Match[Chain], index: PrefixIndex[Chain], config: IdentityConfig
) -> Rung | None:
    """Compaction: only the stem survives, but the prompt is as long as the history it replaces.

    Holds only if exactly one silent trace fits: in a crowd that shares one stem nothing is certain.
    """
    if found.depth == 0:
        return None
    chains = list(islice(index.near(found, MAX_CANDIDATES), MAX_CANDIDATES))
    if len(chains) == MAX_CANDIDATES:
        return None
    block_tokens = arrival.num_tokens / len(arrival.blocks)
    fits: dict[Trace, Chain] = {}
    for shared in chains:
        trace, chain = shared.tip.owner.trace, shared.tip.owner
        silent_s = now - trace.last_event_s
        if trace.num_running or silent_s > config.compaction_window_s or chain.tokens < MIN_REWRITTEN_TOKENS:
            continue
        stem_tokens = shared.depth * block_tokens
        own = chain.tokens - stem_tokens
        grown = (arrival.num_tokens - stem_tokens - own) / own if own > stem_tokens else 1.0
        if EDIT_SHRINK <= grown <= EDIT_GROWTH:
            fits.setdefault(trace, chain)
    if len(fits) != 1:
        return None
    ((trace, chain),) = fits.items()
    return Rung(Source.COMPACTION, 0.6, found, trace, chain)
