"""What an experiment is: a question to a real engine, and where its load comes from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from impala_vllm.replay.load import Load
from impala_vllm.replay.lowering import Scale
from impala_vllm.replay.plan import Plan
from impala_vllm.replay.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Source:
    """Where the load of an experiment comes from, as the command line says."""

    traces: Path
    seed: int
    vocabulary: Vocabulary
    num_sessions: int | None = None


@dataclass(frozen=True, slots=True)
class Experiment:
    """One question to a real engine."""

    name: str
    arms: tuple[str, ...]
    plan: Callable[[Source, "Experiment"], Plan]
    figures: tuple[str, ...]
    """What to record per arm: `FIELD` of `Measures`, `FIELD of PART` of the plan, or `FIGURE / FIGURE`."""
    ratios: tuple[str, ...] = ()
    """Figures to compare with the first arm, pair by pair."""
    num_sessions: int = 16
    scale: Scale = field(default_factory=Scale)
    load: Load = field(default_factory=Load)
    capacity_share: float | None = None
    """Open loop instead of `load`: Poisson arrivals at this share of the first arm's capacity."""
    num_pairs: int = 1
    fresh_engines: bool = False
    machine: dict[str, Any] = field(default_factory=dict[str, Any])
    """What differs from the defaults of `arms.Machine`."""
    room: dict[str, Any] = field(default_factory=dict[str, Any])
    """What differs from the defaults of `arms.Room`."""
    links: tuple[float, float] | None = None
    """How many times as fast as the engine prefills KV moves to and from host, and NVMe; None: as fast as it can."""
