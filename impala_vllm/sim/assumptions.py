"""What a simulation's figures rest on, in words: each line is something that could be otherwise."""

from collections.abc import Iterator, Sequence

from impala_vllm.sim.recognised import Recognised
from impala_vllm.sim.recorded import Assumed
from impala_vllm.sim.routers import ROUTERS
from impala_vllm.sim.sessions import Workload
from impala_vllm.sim.simulation import Setup
from impala_vllm.workload import Turn

FEW = 20
"""Tasks below which one in twenty is none of them."""


def assumptions(
    load: Workload, setup: Setup, log: Recognised, assumed: Assumed, num_tasks: int, num_cut: int
) -> Iterator[str]:
    """Of serving `load`, picked from `num_tasks` tasks of the log, which lost `num_cut` turns for their length."""
    yield f"timing {setup.timing.describe()}"
    yield _machines(setup)
    yield _below(setup)
    yield _pace(load, setup)
    num_chosen = len(load.roots())
    if num_chosen < num_tasks:
        thinner = ", fewer at a time than in the recording" if _starts_as_recorded(load, setup) else ""
        yield f"{num_chosen:,} of the log's {num_tasks:,} tasks, picked by the seed{thinner}"
    if num_chosen < FEW:
        yield f"only {num_chosen} tasks: with others, such as those of another seed, figures may be others"
    yield _blocks(load, log.turns)
    yield (
        "tool times as recorded, whoever serves; outputs of the recorded length, part of the next prompt where the log "
        "shows it"
    )
    yield "caches are empty at first; nothing takes time but steps and transfers: no planning, tokenising, network"
    models = sorted({turn.model for turn in log.turns if turn.model})
    if len(models) > 1:
        yield f"the log names {len(models)} models ({_some(models)}): served as if by one, without a common prefix"
    most = setup.timing.max_context_tokens
    num_long = sum(turn.num_tokens > most for turn in load.turns()) if most is not None else 0
    if num_long:
        yield f"{num_long:,} turns are longer than the {most:,} tokens that this model takes: served all the same"
    if num_cut:
        yield f"sessions end before the turn that outgrows HBM: {num_cut:,} turns of the log left out"
    if log.num_requests:
        yield (
            f"{log.num_requests:,} requests of the log name no session: recognised as those of {log.num_sessions:,} "
            "sessions by the code that the engine runs, from prefixes they share and when they came"
        )
    if assumed.num_outputs:
        yield f"{assumed.num_outputs:,} turns without an output length: {assumed.output_tokens} tokens each"
    if assumed.num_ends:
        yield f"{assumed.num_ends:,} turns without an end: all the time until the next one is the tool's"


def _machines(setup: Setup) -> str:
    if setup.num_replicas == 1:
        return f"HBM for {setup.hbm_tokens:,} tokens on one replica"
    return (
        f"HBM for {setup.hbm_tokens:,} tokens on each of {setup.num_replicas:,} replicas; router {setup.router}, "
        f"whatever the policy: {ROUTERS[setup.router].about}"
    )


def _below(setup: Setup) -> str:
    if not setup.host_tokens:
        return "nothing below HBM, for any policy: impala's own default on a GPU is a host tier (--host-tokens)"
    timing = setup.timing
    rates = f"{_rate(timing.host_bytes_per_s)} each way"
    room = f"host DRAM for {setup.host_tokens:,} tokens, {rates}"
    if setup.nvme_tokens:
        room += (
            f"; NVMe for {setup.nvme_tokens:,}, {_rate(timing.nvme_read_bytes_per_s)} reads and "
            f"{_rate(timing.nvme_write_bytes_per_s)} writes"
        )
    return f"{room}; stock has them through vLLM's offloading connector, which is off unless asked for"


def _rate(bytes_per_s: float | None) -> str:
    return "no time" if bytes_per_s is None else f"{bytes_per_s / 1e9:.3g} GB/s"


def _pace(load: Workload, setup: Setup) -> str:
    arrivals = setup.arrivals
    if arrivals.num_live is not None and arrivals.num_live < len(load.roots()):
        return f"{arrivals.num_live} tasks at a time, the next starts when one has ended"
    if _starts_as_recorded(load, setup):
        return "tasks start as recorded, so that how many end in an hour is the log's doing more than the servers'"
    return f"all tasks start within {arrivals.spread_s:g} s"


def _starts_as_recorded(load: Workload, setup: Setup) -> bool:
    return load.has_one_clock and setup.arrivals.num_live is None


def _blocks(load: Workload, turns: Sequence[Turn]) -> str:
    merged = load.block_size // turns[0].block_size
    taken = f", {merged} of the log's taken as one" if merged > 1 else ""
    return f"blocks of {load.block_size:,} tokens{taken}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
