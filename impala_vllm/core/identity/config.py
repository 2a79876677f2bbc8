"""Bounds and priors of trace identity: the few numbers that are not learned."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IdentityConfig:
    """Bounds and priors of trace identity."""

    max_traces: int = 4096
    """Live traces remembered; the least recently active go first. 2,000 agents and their children."""
    max_blocks: int = 4_000_000
    """Block hashes indexed over all traces: 64 M tokens at 16 a block, some 600 MB."""
    lease_s: float = 21600.0
    """A trace silent for this long is forgotten. Gaps of real agents: p99 15 min, but people come back after lunch:
    one hour costs 0.1 points of link F1 against six."""
    subagent_window_s: float = 2.0
    """A child starts within this long of its parent's last output. Measured: 33 of 34 within 1.1 s."""
    compaction_window_s: float = 300.0
    """Within this long a silent trace may come back with a rewritten history. Five in six
    of those that come within 900 s do, and longer windows catch strangers."""
