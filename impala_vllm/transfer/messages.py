"""What the engine's thread tells the coordinator, beside the jobs themselves."""

from dataclasses import dataclass
from typing import TypeAlias

from impala_vllm.transfer.jobs import Job


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The job's `is_withdrawn` was set."""

    job_id: int


@dataclass(frozen=True, slots=True)
class Forget:
    """What the slot holds, or gets from jobs of a smaller serial, is void."""

    slot: int | None
    """None: every slot."""
    serial: int


Message: TypeAlias = Job | Withdraw | Forget
