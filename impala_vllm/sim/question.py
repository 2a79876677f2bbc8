"""From what a user asks - a log, machines, a load - to a workload and a set-up, with every assumption in words.

Load is oversubscription: the working set of the sessions that are live over the HBM of all replicas.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from impala_vllm.config import ConfigError
from impala_vllm.sim import recorded
from impala_vllm.sim.assumptions import assumptions
from impala_vllm.sim.recognised import Recognised, recognise
from impala_vllm.sim.recorded import Assumed
from impala_vllm.sim.routers import DEFAULT
from impala_vllm.sim.sessions import Session, Workload, working_set_tokens
from impala_vllm.sim.simulation import Arrivals, Setup, choose
from impala_vllm.sim.timing import Timing
from impala_vllm.workload import Turn

LEAST_LOAD = 0.01
"""Below it HBM is many times as large as all there is to keep, up to numbers that are none."""

NEARLY = 0.99
"""Of a load is as good as it."""

DEFAULT_LOAD = 4.0
"""Where neither a load nor a number of sessions is given, and the log does not say how sessions overlap."""


@dataclass(frozen=True, slots=True)
class Asked:
    """As on the command line; None: not given."""

    timing: Timing
    num_replicas: int = 1
    host_tokens: int = 0
    """Of each replica, as all room is."""
    nvme_tokens: int = 0
    hbm_tokens: int | None = None
    num_sessions: int | None = None
    load: float | None = None
    seed: int = 0
    router: str = DEFAULT
    """One of `ROUTERS`."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is simulated."""

    workload: Workload
    setup: Setup
    oversubscription: float
    """Of the tasks that are live at a time; where they start as recorded, of those that overlap on idle servers."""
    num_live: int
    """Tasks."""
    num_unnamed: int
    """Requests of the log that name no session."""
    num_recognised: int
    """Sessions found in them."""
    assumptions: tuple[str, ...]

    def describe_workload(self) -> dict[str, Any]:
        """Plain data for JSON."""
        prompt_tokens = sum(t.prompt_tokens for t in self.workload.turns())
        return {
            "tasks": len(self.workload.roots()),
            "sessions": len(self.workload.sessions),
            "unnamed_requests": self.num_unnamed,
            "recognised_sessions": self.num_recognised,
            "turns": self.workload.num_turns(),
            "prompt_tokens": prompt_tokens,
            "output_tokens": sum(t.output_tokens for t in self.workload.turns()),
            "working_set_tokens": self.workload.working_set_tokens(),
            "longest_turn_tokens": self.workload.longest_tokens(),
            "block_tokens": self.workload.block_size,
            "hit_ratio_bound": 1 - self.workload.new_tokens() / prompt_tokens,
        }

    def describe_config(self, seed: int) -> dict[str, Any]:
        """Plain data for JSON."""
        timing = self.setup.timing
        return {
            "replicas": self.setup.num_replicas,
            "router": self.setup.router if self.setup.num_replicas > 1 else None,
            "hbm_tokens": self.setup.hbm_tokens,
            "host_tokens": self.setup.host_tokens,
            "nvme_tokens": self.setup.nvme_tokens,
            "live_tasks": self.num_live,
            "oversubscription": self.oversubscription,
            "max_num_batched_tokens": timing.max_num_batched_tokens,
            "max_num_seqs": timing.max_num_seqs,
            "timing": {"name": timing.name, "engine": timing.engine, "source": timing.source.value},
            "seed": seed,
            "assumptions": list(self.assumptions),
        }


def ask(turns: Sequence[Turn], asked: Asked) -> Question:
    """Resolve it. Raises WorkloadError or ConfigError with one line."""
    if asked.nvme_tokens and not asked.host_tokens:
        raise ConfigError("NVMe is read into host DRAM first; give --host-tokens as well")
    if asked.load is not None and asked.load < LEAST_LOAD:
        raise ConfigError(f"--load {asked.load:g} is HBM for far more than all sessions; give {LEAST_LOAD:g} or more")
    log = recognise(turns)
    everything, assumed = recorded.workload(log.turns)
    if asked.hbm_tokens is not None or asked.load is None:
        return _on_given_room(everything, log, assumed, asked, asked.hbm_tokens or asked.timing.hbm_tokens)
    load = choose(everything, asked.num_sessions, asked.seed)
    # The longest turn has to fit, and two partial blocks with it.
    least = load.longest_tokens() + 2 * load.block_size
    working_set = load.working_set_tokens()
    hbm_tokens = max(round(working_set / asked.load / asked.num_replicas), least)
    setup = _setup(asked, hbm_tokens, None)
    said = assumptions(load, setup, log, assumed, len(everything.roots()), 0)
    return _question(load, setup, log, load.roots(), said, asked)


def _on_given_room(everything: Workload, log: Recognised, assumed: Assumed, asked: Asked, hbm_tokens: int) -> Question:
    """Sessions that outgrow HBM are cut; the load says how many of them are live."""
    size = everything.block_size
    fitting = everything.within(hbm_tokens // size * size)
    if not fitting.sessions:
        shortest = min(s.turns[0].num_tokens for s in everything.sessions)
        raise ConfigError(
            f"HBM for {hbm_tokens:,} tokens cannot hold a single request of this log; give --hbm-tokens "
            f"{-(-shortest // size) * size} or more, or a --timing with more"
        )
    num_cut = everything.num_turns() - fitting.num_turns()
    load = choose(fitting, asked.num_sessions, asked.seed)
    level = asked.load
    if level is None and asked.num_sessions is None and not load.has_one_clock:
        level = DEFAULT_LOAD
    num_live = None if level is None else _num_live(load, level * hbm_tokens * asked.num_replicas)
    setup = _setup(asked, hbm_tokens, num_live)
    said = assumptions(load, setup, log, assumed, len(fitting.roots()), num_cut)
    roots = load.roots()
    live = roots[:num_live] if num_live is not None else most_live(load, asked.timing) if load.has_one_clock else roots
    return _question(load, setup, log, live, said, asked)


def _setup(asked: Asked, hbm_tokens: int, num_live: int | None) -> Setup:
    return Setup(
        asked.timing, hbm_tokens, asked.num_replicas, asked.host_tokens, asked.nvme_tokens, Arrivals(num_live=num_live),
        asked.router, asked.seed,
    )  # fmt: skip


def _question(
    load: Workload, setup: Setup, log: Recognised, live: Sequence[Session], said: Iterable[str], asked: Asked
) -> Question:
    for name, tokens in (("host", setup.host_tokens), ("nvme", setup.nvme_tokens)):
        if 0 < tokens < load.block_size:
            raise ConfigError(
                f"--{name}-tokens {tokens} holds no block of {load.block_size:,} tokens; give that many or more, or 0"
            )
    oversubscription = _working_set(load, live) / (setup.hbm_tokens * setup.num_replicas)
    lines = list(said)
    if asked.load is not None and oversubscription < NEARLY * asked.load:
        why = "HBM holds the longest turn at least" if asked.hbm_tokens is None else "there are no more tasks"
        lines.insert(0, f"the load is {oversubscription:.2g}, not the {asked.load:g} that was asked for: {why}")
    # Not the log itself: it is many times as large as what is served of it.
    return Question(load, setup, oversubscription, len(live), log.num_requests, log.num_sessions, tuple(lines))


def most_live(load: Workload, timing: Timing) -> list[Session]:
    """The tasks that overlap where most do, as they started and on servers that are idle: busy ones have more."""
    events: list[tuple[float, int, int]] = []
    roots = load.roots()
    for number, root in enumerate(roots):
        events += [(root.arrival_s, 1, number), (root.arrival_s + _least_s(root, timing), 0, number)]
    events.sort()
    live: dict[int, None] = {}
    most = peak = 0
    for position, event in enumerate(events, 1):
        _happen(event, live)
        if len(live) > most:
            most, peak = len(live), position
    live.clear()
    for event in events[:peak]:
        _happen(event, live)
    return [roots[number] for number in live]


def _happen(event: tuple[float, int, int], live: dict[int, None]) -> None:
    _, is_start, number = event
    if is_start:
        live[number] = None
    else:
        live.pop(number, None)


def _least_s(root: Session, timing: Timing) -> float:
    """A task's own tools, and its turns on an idle server."""
    total_s, before = 0.0, 0
    for turn in root.turns:
        new = max(1, turn.prompt_tokens - before)
        total_s += turn.gap_s + timing.prefill_s(new, turn.prompt_tokens - new)
        total_s += turn.output_tokens * timing.step_s((), 1, turn.num_tokens)
        before = turn.num_tokens
    return total_s


def _num_live(load: Workload, tokens: float) -> int:
    """So many of the first tasks have a working set of at least `tokens`; all, if none has."""
    roots = load.roots()
    low, high = 1, len(roots)
    while low < high:
        middle = (low + high) // 2
        if _working_set(load, roots[:middle]) >= tokens:
            high = middle
        else:
            low = middle + 1
    return low


def _working_set(load: Workload, roots: Iterable[Session]) -> int:
    return working_set_tokens((s for root in roots for s in load.family(root)), load.block_size)
