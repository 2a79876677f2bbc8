"""From what a user asks - a log, machines, a load - to a workload and a set-up, with every assumption in words.

Load is oversubscription: the working set of the sessions that are live over the HBM of all replicas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from impala_vllm.config import ConfigError
from impala_vllm.sim import recorded
from impala_vllm.sim.recognised import Recognised, recognise
from impala_vllm.sim.recorded import Assumed
from impala_vllm.sim.routers import DEFAULT, ROUTERS
from impala_vllm.sim.sessions import Workload, working_set_tokens
from impala_vllm.sim.simulation import Arrivals, Setup, choose
from impala_vllm.sim.timing import Timing
from impala_vllm.workload import Turn

LEAST_LOAD = 0.01
"""Below it HBM is many times as large as all there is to keep, up to numbers that are none."""

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
    """Of the sessions that are live at a time, as far as that is known."""
    num_live: int
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
    return _question(load, log, assumed, asked, hbm_tokens, None, working_set, 0)


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
    working_set = _working_set(load, num_live or len(load.roots()))
    return _question(load, log, assumed, asked, hbm_tokens, num_live, working_set, num_cut)


def _question(
    load: Workload,
    log: Recognised,
    assumed: Assumed,
    asked: Asked,
    hbm_tokens: int,
    num_live: int | None,
    working_set: int,
    num_cut: int,
) -> Question:
    for name, tokens in (("host", asked.host_tokens), ("nvme", asked.nvme_tokens)):
        if 0 < tokens < load.block_size:
            raise ConfigError(
                f"--{name}-tokens {tokens} holds no block of {load.block_size:,} tokens; give that many or more, or 0"
            )
    arrivals = Arrivals(num_live=num_live)
    setup = Setup(
        asked.timing, hbm_tokens, asked.num_replicas, asked.host_tokens, asked.nvme_tokens, arrivals, asked.router,
        asked.seed,
    )  # fmt: skip
    said = [
        f"timing {asked.timing.describe()}",
        _machines(setup),
        _below(setup),
        _pace(load, setup),
        f"blocks of {load.block_size:,} tokens",
        "tool times as recorded, whoever serves; outputs of the recorded length, part of the next prompt where the "
        "log shows it",
    ]
    if num_cut:
        said.append(f"sessions end before the turn that outgrows HBM: {num_cut:,} turns of the log left out")
    if log.num_requests:
        said.append(
            f"{log.num_requests:,} requests of the log name no session: recognised as those of {log.num_sessions:,} "
            "sessions by the code that the engine runs, from prefixes they share and when they came"
        )
    if assumed.num_outputs:
        said.append(f"{assumed.num_outputs:,} turns without an output length: {assumed.output_tokens} tokens each")
    if assumed.num_ends:
        said.append(f"{assumed.num_ends:,} turns without an end: all the time until the next one is the tool's")
    oversubscription = working_set / (hbm_tokens * asked.num_replicas)
    num_live = num_live or len(load.roots())
    # Not the log itself: it is many times as large as what is served of it.
    return Question(load, setup, oversubscription, num_live, log.num_requests, log.num_sessions, tuple(said))


def _machines(setup: Setup) -> str:
    if setup.num_replicas == 1:
        return f"HBM for {setup.hbm_tokens:,} tokens on one replica"
    return (
        f"HBM for {setup.hbm_tokens:,} tokens on each of {setup.num_replicas:,} replicas; router {setup.router}, "
        f"whatever the policy: {ROUTERS[setup.router].about}"
    )


def _below(setup: Setup) -> str:
    if not setup.host_tokens:
        return "nothing below HBM"
    timing = setup.timing
    rates = f"{_rate(timing.host_bytes_per_s)} each way"
    if not setup.nvme_tokens:
        return f"host DRAM for {setup.host_tokens:,} tokens, {rates}"
    return (
        f"host DRAM for {setup.host_tokens:,} tokens, {rates}; NVMe for {setup.nvme_tokens:,}, "
        f"{_rate(timing.nvme_read_bytes_per_s)} reads and {_rate(timing.nvme_write_bytes_per_s)} writes"
    )


def _rate(bytes_per_s: float | None) -> str:
    return "no time" if bytes_per_s is None else f"{bytes_per_s / 1e9:.3g} GB/s"


def _pace(load: Workload, setup: Setup) -> str:
    arrivals = setup.arrivals
    if arrivals.num_live is not None and arrivals.num_live < len(load.roots()):
        return f"{arrivals.num_live} tasks at a time, the next starts when one has ended"
    if load.has_one_clock and arrivals.num_live is None:
        return "tasks start as recorded"
    return f"all tasks start within {arrivals.spread_s:g} s"


def _num_live(load: Workload, tokens: float) -> int:
    """So many of the first tasks have a working set of at least `tokens`; all, if none has."""
    roots = load.roots()
    low, high = 1, len(roots)
    while low < high:
        middle = (low + high) // 2
        if _working_set(load, middle) >= tokens:
            high = middle
        else:
            low = middle + 1
    return low


def _working_set(load: Workload, num_tasks: int) -> int:
    sessions = [s for root in load.roots()[:num_tasks] for s in load.family(root)]
    return working_set_tokens(sessions, load.block_size)
