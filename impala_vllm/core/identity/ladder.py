"""The ladder: from what a client says itself down to "new", the first rung that holds.

Answers only; `identity` carries the answer out.
"""

from collections.abc import Mapping
from typing import NamedTuple

from impala_vllm.core.identity.chain import Chain
from impala_vllm.core.identity.config import IdentityConfig
from impala_vllm.core.identity.index import Match, PrefixIndex
from impala_vllm.core.traces import Trace, TraceTable
from impala_vllm.core.types import Arrival, Namespace, Source

NUM_STEM_STARTS = 2
"""A block with which this many further traces started is system prompt, not identity."""


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
        trace = sessions.get((arrival.namespace, arrival.session_id))
        parent = sessions.get((arrival.namespace, arrival.parent_session_id or ""))
        return Rung(Source.EXPLICIT, 1.0, found, trace, parent=parent)
    stem = index.stem_depth(found)
    if found.depth > stem:
        for shared in index.near(found, 32):
            chain = shared.tip.owner
            if shared.depth <= stem:
                break
            if shared.depth >= chain.prompt_depth - 1 and not chain.running:
                return Rung(Source.CONTINUATION, 0.9, found, chain.trace, chain, extends=True)
    return Rung(Source.NEW, 0.5, found)
