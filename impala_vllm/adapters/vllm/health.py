"""Is this server well: one word, and the reasons, from the engines' heartbeats."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from impala_vllm.config import HealthConfig


class Status(Enum):
    """From best to worst."""

    IDLE = "idle"
    """Well, nothing to do."""
    OK = "ok"
    """Well and working."""
    DEGRADED = "degraded"
    """Serving, but impala or a part of it is not doing its work; see the reasons."""
    STALLED = "stalled"
    """Requests wait and nothing moves: replace this server."""


_ORDER = list(Status)


@dataclass(slots=True)
class Health:
    """The worst status of all ranks, and every reason for it."""

    status: Status = Status.IDLE
    reasons: list[str] = field(default_factory=list)

    def lower(self, status: Status, reason: str | None = None) -> None:
        """Note a status; the worst one stays."""
        self.status = max(self.status, status, key=_ORDER.index)
        if reason is not None:
            self.reasons.append(reason)


def judge(snapshots: list[dict[str, Any]] | None, silent_s: float, is_dead: bool, config: HealthConfig) -> Health:
    """The health of a server whose engines sent `snapshots`, None if they did not answer."""
    health = Health()
    if is_dead:
        health.lower(Status.STALLED, "the engine is dead")
    elif snapshots is None:
        stalled = silent_s > config.stalled_after_s
        health.lower(
            Status.STALLED if stalled else Status.DEGRADED, f"the engine has not answered for {silent_s:.0f} s"
        )
    for snapshot in snapshots or []:
        _judge_rank(health, snapshot, config)
    return health


def _judge_rank(health: Health, snapshot: dict[str, Any], config: HealthConfig) -> None:
    rank = f"rank {snapshot['rank']}"
    if not snapshot["observed"]:
        health.lower(Status.DEGRADED, f"{rank}: impala does not watch this scheduler")
        return
    if snapshot["unfinished"]:
        health.lower(Status.OK)
        if snapshot["stuck_s"] > config.stalled_after_s:
            health.lower(
                Status.STALLED,
                f"{rank}: {snapshot['unfinished']} requests, no progress for {snapshot['stuck_s']:.0f} s",
            )
    if snapshot["paused"]:
        health.lower(Status.DEGRADED, f"{rank}: the scheduler is paused")
    if snapshot["policy"] is not None and not snapshot["policy"]["on"]:
        health.lower(Status.DEGRADED, f"{rank}: policy failed and fell back to vLLM's own order (see the log)")
    tiers = (snapshot["policy"] or {}).get("tiers") or {}
    if not tiers.get("nvme_usable", 1.0):
        health.lower(Status.DEGRADED, f"{rank}: the NVMe tier is out of use, what lies there is computed (see the log)")
    ledger = snapshot["ledger"]
    if ledger is not None and not ledger["on"]:
        health.lower(Status.DEGRADED, f"{rank}: the ledger is switched off ({ledger['error']}; see the log)")
    elif ledger is not None and ledger["trouble"] is not None:
        health.lower(Status.DEGRADED, f"{rank}: the ledger cannot be written ({ledger['trouble']}; see the log)")
    if not snapshot["identity"]["on"]:
        health.lower(
            Status.DEGRADED, f"{rank}: identity is switched off ({snapshot['identity']['error']}; see the log)"
        )
