"""`python -m benchmarks.serving EXPERIMENT [--traces FILE]`: run it, print it, record it.

Starts its own servers and stops them. Without --traces (or IMPALA_TRACES) the small bundled log is
used; the full one is kv-cache-tester's, see docs/benchmarks.md.
"""

import dataclasses
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import record
from benchmarks.serving import capacity, figures, links, pool, sustained
from benchmarks.serving.experiment import Experiment, Source
from benchmarks.serving.experiments import EXPERIMENTS
from impala_vllm.replay import arms, recording, tiny_model
from impala_vllm.replay.comparison import order
from impala_vllm.replay.load import Arrivals, Load
from impala_vllm.replay.progress import TerminalWatcher
from impala_vllm.replay.report import Report, write
from impala_vllm.replay.server import ServerError
from impala_vllm.replay.trial import Trial, run_trials
from impala_vllm.replay.vocabulary import ModelError, Vocabulary
from impala_vllm.workload import WorkloadError


@click.command()
@click.argument("experiment", type=click.Choice([*EXPERIMENTS, "sustained"]))
@click.option("--traces", type=click.Path(path_type=Path), envvar="IMPALA_TRACES", help="Recorded log to replay.")
@click.option("--arms", "arm_names", help="Comma-separated arms instead of the experiment's own.")
@click.option("--pairs", type=click.IntRange(min=1), help="Repetitions, interleaved A B B A ...")
@click.option("--sessions", type=click.IntRange(min=1), help="How many sessions or requests.")
@click.option("--turns", type=click.IntRange(min=1), help="First turns of each session only.")
@click.option("--prompt-scale", type=click.IntRange(min=1), help="Divide prompts by this.")
@click.option("--gap-scale", type=click.FloatRange(min=0.1), help="Divide gaps by this.")
@click.option("--max-gap", type=click.FloatRange(min=0), help="Cap of a scaled gap, in seconds.")
@click.option("--poisson", type=click.FloatRange(min=0.001), help="Open loop at so many sessions a second.")
@click.option("--concurrency", type=click.IntRange(min=1), help="Closed loop with so many sessions live.")
@click.option("--hbm-blocks", type=click.IntRange(min=2), help="KV pool of the bounded arms, in blocks.")
@click.option(
    "--oversubscription", type=click.FloatRange(min=0.01), help="Size that pool so that working set / HBM is this."
)
@click.option("--host-share", type=click.FloatRange(min=0.01), help="Host tier as a share of HBM; 1 otherwise.")
@click.option("--nvme-share", type=click.FloatRange(min=0.01), help="NVMe tier as a share of HBM; 8 otherwise.")
@click.option(
    "--host-cap",
    type=click.FloatRange(min=1),
    help="KV to and from host, tokens a second each way; else as EXPERIMENT says.",
)
@click.option("--nvme-cap", type=click.FloatRange(min=1), help="The same to and from NVMe.")
@click.option("--model", type=click.Path(path_type=Path), help="Model directory; the 26 M one is built otherwise.")
@click.option("--dtype", help="bfloat16 or float32; what is fast here otherwise.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--fresh-engines", is_flag=True, help="A new engine for every run, not just a new cache salt.")
@click.option("--send-session-ids", is_flag=True, help="Send X-Session-ID; off, as clients change nothing.")
@click.option("--html", type=click.Path(path_type=Path), help="Write an HTML report here.")
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results.")
def main(experiment: str, **options: Any) -> None:
    """Run EXPERIMENT on a real vLLM engine."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(stderr=True)
    logs = Path(tempfile.mkdtemp(prefix="impala-serving-"))
    try:
        _run(experiment, options, console, logs)
    except (WorkloadError, ServerError, ModelError, tiny_model.TinyModelError, ValueError) as e:
        click.echo(f"error: {e}", err=True)
        if not any(logs.iterdir()):
            logs.rmdir()
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        sys.exit(130)
    shutil.rmtree(logs)


def _run(name: str, options: dict[str, Any], console: Console, logs: Path) -> None:
    _check(name, options)
    experiment = EXPERIMENTS["baseline" if name == "sustained" else name]
    if name == "observe-cost-azure" and options["traces"] is None:
        raise ValueError("observe-cost-azure needs --traces with an Azure LLM inference trace (.csv); see docs")
    overrides = {"num_turns": "turns", "prompt": "prompt_scale", "gap": "gap_scale", "max_gap_s": "max_gap"}
    changed = {k: options[v] for k, v in overrides.items() if options[v] is not None}
    model = options["model"] or tiny_model.build("26m")
    machine = arms.Machine(model, **experiment.machine)
    if options["hbm_blocks"]:
        machine = dataclasses.replace(machine, hbm_blocks=options["hbm_blocks"])
    if options["dtype"]:
        machine = dataclasses.replace(machine, dtype=options["dtype"])
    machine = dataclasses.replace(machine, room=_room(experiment, options))
    scale = dataclasses.replace(experiment.scale, **changed)
    if scale.max_context_tokens > machine.max_model_len:
        scale = dataclasses.replace(scale, max_context_tokens=machine.max_model_len)
    load = experiment.load
    if options["poisson"]:
        load = Load(Arrivals.POISSON, rate_per_s=options["poisson"], seed=options["seed"])
    if options["concurrency"]:
        load = Load(Arrivals.STEADY, concurrency=options["concurrency"])
    experiment = dataclasses.replace(experiment, scale=scale, load=load)
    traces = options["traces"] or recording.bundled()
    source = Source(traces, options["seed"], Vocabulary.of_model(machine.model), options["sessions"])
    with console.status(f"reading {traces.name}"):
        plan = experiment.plan(source, experiment)
    times = options["oversubscription"]
    machine = pool.oversubscribed(machine, plan, times) if times else pool.fitted(machine, plan)
    chosen = arms.pick(options["arm_names"] or ",".join(experiment.arms))
    caps = options["host_cap"], options["nvme_cap"]
    if experiment.links and None in caps:
        with console.status("how fast does it prefill?"):
            room = links.sized(machine.room, experiment.links, plan, machine, logs)
        machine = dataclasses.replace(machine, room=links.with_caps(room, *caps))
    if experiment.capacity_share and not (options["poisson"] or options["concurrency"]):
        with console.status(f"{chosen[0].name}: how many tasks a second?"):
            rate = capacity.measured(plan, chosen[0], machine, logs)
        load = capacity.load_at(experiment.capacity_share, rate, options["seed"])
        experiment = dataclasses.replace(experiment, load=load)
    console.print(f"{name}: {figures.describe(plan, experiment, machine)}", highlight=False)
    if any(arm.tiers for arm in chosen):
        console.print(f"tiers: {machine.room.describe()}", highlight=False)
    if name == "sustained":
        sustained.run(plan, chosen, machine, logs, console, None if options["no_record"] else options["seed"])
        return
    runs = order([arm.name for arm in chosen], options["pairs"] or experiment.num_pairs)
    trials: list[Trial] = []
    stopped: BaseException | None = None
    try:
        with TerminalWatcher(console, len(runs)) as watcher:
            run_trials(
                plan,
                chosen,
                runs,
                machine,
                load,
                logs,
                watcher,
                fresh_engines=options["fresh_engines"] or experiment.fresh_engines,
                send_session_ids=options["send_session_ids"],
                done=trials,
            )
    except (KeyboardInterrupt, SystemExit) as e:
        trials = figures.whole(trials, [arm.name for arm in chosen])
        if not trials:
            raise
        stopped = e
        console.print(f"stopped after {len(trials)} of {len(runs)} runs; what all arms have had counts")
    records = figures.records(experiment, trials, plan, machine, traces, options)
    figures.show(records, Console())
    if not options["no_record"]:
        console.print(f"recorded in {record.append(records)}; `python -m benchmarks.report` writes RESULTS.md")
    if options["html"]:
        title = f"{name}: {len(plan.roots())} tasks on {', '.join(arm.name for arm in chosen)}"
        write(Report(title, plan, tuple(chosen), tuple(trials), machine, scale, load), options["html"])
    if any(t.measures.num_failed for t in trials):
        raise ServerError("some requests failed, see above: the figures do not count")
    if stopped is not None:
        raise stopped


def _room(experiment: Experiment, options: dict[str, Any]) -> arms.Room:
    given = {
        "host_share": options["host_share"],
        "nvme_share": options["nvme_share"],
        "host_tokens_per_s": options["host_cap"],
        "nvme_tokens_per_s": options["nvme_cap"],
    }
    return arms.Room(**experiment.room | {name: value for name, value in given.items() if value is not None})


def _check(name: str, options: dict[str, Any]) -> None:
    """Refuse what would be ignored, or would fail only once everything has run."""
    if options["poisson"] and options["concurrency"]:
        raise ValueError("--poisson is open loop and --concurrency closed loop; drop one of them")
    if options["hbm_blocks"] and options["oversubscription"]:
        raise ValueError("--hbm-blocks and --oversubscription both size the pool; drop one of them")
    arrivals = EXPERIMENTS[name].load.arrivals if name in EXPERIMENTS else None
    if arrivals is Arrivals.RECORDED and (options["poisson"] or options["concurrency"]):
        raise ValueError(f"{name}: when its parts start is what it is about; leave --poisson and --concurrency out")
    # It searches for the number of live sessions itself, on one load a step.
    fixed = ("pairs", "poisson", "concurrency", "fresh_engines", "send_session_ids", "html")
    if name == "sustained" and (given := [option for option in fixed if options[option]]):
        raise ValueError(f"sustained: --{given[0].replace('_', '-')} changes nothing here; leave it out")
    if options["html"] and not options["html"].absolute().parent.is_dir():
        raise ValueError(f"--html {options['html']}: no such folder; make it first")


if __name__ == "__main__":
    main()
