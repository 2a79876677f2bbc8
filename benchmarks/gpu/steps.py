"""The steps of a GPU run, most valuable first, and which of them a budget allows.

Each step runs in a process of its own (`launch`), so that one that crashes or hangs costs only itself.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to find out."""

    name: str
    function: str
    """`MODULE:FUNCTION` below `benchmarks.gpu`."""
    needs_s: float
    """Started only with so much of the budget left. A prior: imports, compilation, the work."""
    limit_s: float
    """Stopped after this long."""
    arguments: tuple[tuple[str, str], ...] = ()
    """Keyword arguments of the function."""
    after: str | None = None
    """A step without which this one is pointless: left out when that one was tried and failed."""
    instead_of: str | None = None
    """A step that makes this one needless: left out when that one was done."""
    rehearses: bool = False
    """Has something to do without a GPU."""
    needs_vllm: bool = False


REHEARSAL_PATIENCE = 10
"""Limits are those of a machine with a GPU; where there is none, twenty others may be at work."""
ARMS = ("stock", "impala", "upstream")
"""As many as the rest of a short loan allows: impala against stock first."""
OWN_SWAP = "impala-vllm-swap"
"""impala with vLLM's own worker: what of a difference is the copies' doing."""


def _smoke(name: str, **arguments: str) -> Step:
    made = tuple(arguments.items())
    return Step(f"engine-{name}", "smoke:run", 40, 120, made, "libraries", rehearses=True, needs_vllm=True)


def _sessions(shape: str, arm: str, needs_s: float, limit_s: float) -> Step:
    arguments = (("shape", shape), ("arm", arm))
    name = f"sessions-{shape}-{arm}"
    return Step(name, "sessions:run", needs_s, limit_s, arguments, "libraries", rehearses=True, needs_vllm=True)


STEPS = (
    Step("device", "device:run", 10, 90, rehearses=True),
    Step("link", "link:run", 15, 90, rehearses=True),
    Step("ops", "check:run", 30, 150, rehearses=True),
    Step("libraries", "libraries:run", 20, 120, rehearses=True, needs_vllm=True),
    Step("bandwidth", "bandwidth:run", 40, 90, after="ops", rehearses=True),
    Step("worker", "worker:run", 30, 90, after="libraries", rehearses=True, needs_vllm=True),
    Step("overlap", "overlap:run", 20, 60, after="ops", rehearses=True),
    _smoke("graphs", runner="v2", graphs="yes"),
    # The least that can run, where graphs did not: what follows takes the mode that did.
    replace(_smoke("eager", runner="v1", graphs="no"), instead_of="engine-graphs"),
    _smoke("impala", arm="impala"),
    _smoke("impala-v1", runner="v1", arm="impala"),
    *(_sessions("1b", arm, 80, 170) for arm in ARMS),
    *(_sessions("8b", arm, 70, 150) for arm in ARMS),
    _smoke("offload", runner="v2", graphs="yes", arm="upstream"),
    _sessions("1b", OWN_SWAP, 80, 170),
    _smoke("fp8", runner="v2", graphs="yes", arm="impala-fp8"),
    _smoke("offload-v1", runner="v1", graphs="no", arm="upstream"),
    Step("pack", "packing:run", 30, 90, after="ops", rehearses=True),
    Step("tune", "tune:run", 30, 120, after="ops", rehearses=True),
)


class Status(Enum):
    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step."""

    name: str
    status: Status
    seconds: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        took = f" after {self.seconds:.0f} s" if self.seconds else ""
        return f"{self.status.value}{took}{f': {self.why}' if self.why else ''}"


Launch = Callable[[Step, float], Outcome]
"""Runs a step for at most so many seconds. Never raises."""


def pick(only: Sequence[str] = (), without: Sequence[str] = (), *, rehearsal: bool = False) -> list[Step]:
    """Steps whose name is or begins with one of `only` (none: all), but for those of `without`, in order.

    Raises ValueError with one line for a name that is no step's.
    """
    for name in (*only, *without):
        if not any(_covers(name, step) for step in STEPS):
            raise ValueError(f"no step {name!r}; steps: {', '.join(s.name for s in STEPS)}")
    chosen = [s for s in STEPS if not only or any(_covers(name, s) for name in only)]
    chosen = [s for s in chosen if not any(_covers(name, s) for name in without)]
    if not rehearsal:
        return chosen
    return [replace(s, limit_s=REHEARSAL_PATIENCE * s.limit_s) for s in chosen if s.rehearses]


def run(
    steps: Sequence[Step],
    budget_s: float,
    launch: Launch,
    say: Callable[[str], None],
    now: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run what fits into the budget, in order. Nothing that one step does stops the next."""
    return _Run(budget_s, launch, say, now).all(steps)


@dataclass
class _Run:
    budget_s: float
    launch: Launch
    say: Callable[[str], None]
    now: Callable[[], float]
    outcomes: list[Outcome] = field(default_factory=list[Outcome])

    def all(self, steps: Sequence[Step]) -> list[Outcome]:
        begin = self.now()
        for step in steps:
            left_s = self.budget_s - (self.now() - begin)
            outcome = self._refusal(step, left_s) or self.launch(step, min(step.limit_s, left_s))
            self.outcomes.append(outcome)
            self.say(f"{step.name}: {outcome}")
        return self.outcomes

    def _refusal(self, step: Step, left_s: float) -> Outcome | None:
        if left_s < step.needs_s:
            return Outcome(step.name, Status.SKIPPED, why=f"it needs {step.needs_s:g} s, {max(0, left_s):.0f} are left")
        if any(o.name == step.after and o.status is Status.FAILED for o in self.outcomes):
            return Outcome(step.name, Status.SKIPPED, why=f"pointless without {step.after}")
        if any(o.name == step.instead_of and o.status is Status.DONE for o in self.outcomes):
            return Outcome(step.name, Status.SKIPPED, why=f"needless after {step.instead_of}")
        return None


def _covers(name: str, step: Step) -> bool:
    return step.name == name or step.name.startswith(f"{name}-")
