"""What the engine's thread tells the coordinator, beside the jobs themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from impala_vllm.transfer.jobs import Job


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The job's `is_withdrawn` was set."""

    job_id: int


@dataclass(frozen=True, slots=True)
class Forget:
    """What the slots hold, or get from jobs of a smaller serial, is void."""

    slots: Sequence[int] | None
    """None: all."""
    serial: int


Message: TypeAlias = Job | Withdraw | Forget
