"""Who runs next: the turn that needs the least engine time first.

The key is the turn's *uncached* work: prefill not covered by KV in reach, plus expected decode. That is
shortest-job-first and cache affinity in one number. Ageing works on the scale of minutes: a batch that nobody
watches keeps the gain, and nobody starves.
"""

from dataclasses import dataclass

from impala_vllm.core.cost import StepCost
from impala_vllm.core.types import RequestId, TraceId


@dataclass(frozen=True, slots=True)
class RankConfig:
    """Fixed on purpose: bounds."""

    enabled: bool = True
    """Order by uncached work; off: first come, first served."""
    hold_s: float = 300.0
    """A turn that waited this long goes before every younger one: half the time-out of OpenAI clients."""
    ageing_s_per_s: float = 0.005
    """Engine seconds a turn is forgiven for each second it waits: a minute pays for 0.3 s."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A turn that asks to run."""

    request_id: RequestId
    trace_id: TraceId | None
    arrived_s: float
    prompt_tokens: int
    reach_tokens: int
    """Leading prompt tokens whose KV is in reach."""
    output_tokens: float
    """Expected output."""
    priority: int = 0
    """The client's own; smaller first, and the major key."""
    preempted: bool = False
    """Lost its place in the batch once: never overtaken by a newcomer (repeated recompute otherwise)."""


def key(turn: Waiting, cost: StepCost, config: RankConfig, now: float) -> tuple[int, int, float, float]:
    """Sort key, smaller first. Total order up to the request id."""
    waited_s = now - turn.arrived_s
    if turn.preempted:
        return (0, turn.priority, turn.arrived_s, 0.0)
    if waited_s >= config.hold_s:
        return (1, turn.priority, turn.arrived_s, 0.0)
    if not config.enabled:
        return (2, turn.priority, turn.arrived_s, 0.0)
    work_s = cost.prefill_s(turn.prompt_tokens, turn.reach_tokens) + turn.output_tokens * cost.decode_s
    return (2, turn.priority, work_s - config.ageing_s_per_s * waited_s, turn.arrived_s)
