"""Bounds and priors of trace identity: the few numbers that are not learned."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IdentityConfig:
    """Bounds and priors of trace identity."""

    max_traces: int = 4096
    """Live traces remembered; the least recently active go first. 2,000 agents and their children."""
    max_blocks: int = 4_000_000
    """Block hashes indexed over all traces: 64 M tokens at 16 a block, some 600 MB."""
    lease_s: float = 3600.0
    """A trace silent for this long has ended. Gaps of real agents: p99 15 min."""
    subagent_window_s: float = 300.0
    """A child starts within this long of its parent's last output."""
