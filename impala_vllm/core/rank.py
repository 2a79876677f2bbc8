"""Who runs next: the turn that needs the least engine time first.

The key is the turn's *uncached* work: prefill not covered by KV in reach, plus expected decode. That is
shortest-job-first and cache affinity in one number. Ageing works on the scale of minutes: a batch that nobody
watches keeps the gain, and nobody starves.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from impala_vllm.core.cost import StepCost
from impala_vllm.core.types import RequestId, TraceId

Key: TypeAlias = tuple[int, int, float, float]
"""Smaller first. The client's priority, the class, what decides within it."""

PREEMPTED, LATE, IN_TIME, PASSED_BY = range(4)
"""Second part of a key. The last one is for the adapter: a turn that was tried and found no room."""


@dataclass(frozen=True, slots=True)
class RankConfig:
    """Fixed on purpose: bounds."""

    enabled: bool = True
    """Order by uncached work; off: first come, first served."""
    hold_s: float = 300.0
    """A turn that waited this long goes before every younger one of its priority: half the time-out of OpenAI
    clients."""
    ageing_s_per_s: float = 0.005
    """Engine seconds a turn is forgiven for each second it waits: a minute pays for 0.3 s."""


class Waiting(NamedTuple):
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
    """The client's own, where the engine goes by it; smaller first, and the major key."""
    preempted: bool = False
    """Lost its place in the batch once: not overtaken by a newcomer of its priority (repeated recompute otherwise)."""
    load_s: float = 0.0
    """Seconds to bring into HBM what of `reach_tokens` lies in a tier below."""


def key(turn: Waiting, cost: StepCost, config: RankConfig, now: float) -> Key:
    """Sort key, smaller first. It changes only when the turn passes its bound: ageing is in it from the start."""
    if turn.preempted:
        return (turn.priority, PREEMPTED, turn.arrived_s, 0.0)
    if now - turn.arrived_s >= config.hold_s:
        return (turn.priority, LATE, turn.arrived_s, 0.0)
    if not config.enabled:
        return (turn.priority, IN_TIME, turn.arrived_s, 0.0)
    prefill_s = cost.prefill_s(turn.prompt_tokens, turn.reach_tokens)
    work_s = turn.load_s + prefill_s + turn.output_tokens * cost.decode_s
    return (turn.priority, IN_TIME, work_s + config.ageing_s_per_s * turn.arrived_s, turn.arrived_s)
