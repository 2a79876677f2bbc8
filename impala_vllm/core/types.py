"""The facts core is told, and the words it uses for them.

Adapters, the simulator and the log readers all translate into these types; nothing here
knows about tensors, sockets or vLLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, NewType, TypeAlias

RequestId = NewType("RequestId", str)
TraceId = NewType("TraceId", str)

BlockHash: TypeAlias = bytes | int
"""Chained hash of a block and everything before it: equal hash means equal whole prefix.

Opaque bytes where the engine made it, an integer id where a log did.
"""


class Namespace(NamedTuple):
    """What keeps two requests apart for good: no trace ever crosses a namespace.

    A trace's parent may be in another model's namespace, as sub-agents often run one of their own, but
    never in another tenant's or salt's.
    """

    tenant: str = ""
    salt: str = ""
    model: str = ""
    """Served model plus LoRA adapter, where KV differs between them."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as the engine sees it on arrival; everything later is unknown."""

    request_id: RequestId
    blocks: Sequence[BlockHash]
    """Hashes of the prompt's full blocks, root first. Not copied; do not mutate the known part."""
    num_tokens: int
    """Prompt tokens, the last partial block included."""
    namespace: Namespace = Namespace()
    session_id: str | None = None
    """What the client says the trace is called; unique within the namespace only."""
    parent_session_id: str | None = None
    ending: int = 0
    """Digest of the prompt's last tokens, which full blocks may not cover; 0: unknown."""


class Outcome(Enum):
    """How a turn ended."""

    STOP = "stop"
    TOOL_CALL = "tool_call"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finish:
    """A turn's end. `blocks` covers prompt and output, root first."""

    request_id: RequestId
    blocks: Sequence[BlockHash]
    num_tokens: int
    outcome: Outcome = Outcome.UNKNOWN


class Source(Enum):
    """Which rung of the identity ladder answered."""

    EXPLICIT = "explicit"
    RETRY = "retry"
    CONTINUATION = "continuation"
    FORK = "fork"
    ROLLBACK = "rollback"
    COMPACTION = "compaction"
    NEW = "new"
    SUBAGENT = "subagent"
    """A new trace, attached to a parent by timing and shape rather than by prefix."""


@dataclass(frozen=True, slots=True)
class Link:
    """The answer to "whose turn is this": a trace, and how sure we are."""

    trace_id: TraceId
    parent_trace_id: TraceId | None
    source: Source
    confidence: float
    """Between 0 and 1; 1 only for what the client said itself."""
    matched_blocks: int
    """Leading prompt blocks already known in this namespace, the stem included."""
    previous_request_id: RequestId | None = None
    """The turn this one follows, repeats or forks from; None where it starts afresh."""
    previous_prompt_tokens: int = 0
    """Prompt tokens of that turn."""
    previous_tokens: int = 0
    """The same and its output, as far as it has finished."""
