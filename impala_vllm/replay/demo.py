"""The demo: a small recorded load on stock vLLM, on vLLM with impala, and on one that never forgets."""

from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Column, Table

from impala_vllm.replay import arms, recording, report, tiny_model
from impala_vllm.replay.load import Load
from impala_vllm.replay.lowering import Scale, lower
from impala_vllm.replay.progress import TerminalWatcher
from impala_vllm.replay.report import Report, verdict
from impala_vllm.replay.trial import Trial, run_trials
from impala_vllm.replay.vocabulary import Vocabulary

ARMS = ("stock", "impala-enforce", "unbounded")
MODEL = "8m"
# A few minutes on two cores: contexts of some 1,500 tokens, a pool for three of the nine sessions.
SCALE = Scale(prompt=64, output=12, max_output_tokens=24, gap=12.0, max_gap_s=3.0, max_context_tokens=2560)
POOL_BLOCKS = 144


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where the demo left what it found."""

    html: Path
    num_failed: int


def run(out: Path, console: Console) -> Outcome:
    """Run it and write DIR/report.html, DIR/runs.json and DIR/logs. `out` exists and can be written.

    Raises ServerError, TinyModelError or ModelError, in one line. Its servers are gone on return.
    """
    with console.status("building a tiny model (random weights, real tokenizer)"):
        model = tiny_model.build(MODEL)
    plan = lower(recording.choose(recording.bundled()), SCALE, Vocabulary.of_model(model))
    machine = arms.Machine(model, hbm_blocks=POOL_BLOCKS, max_model_len=SCALE.max_context_tokens)
    pool = POOL_BLOCKS * machine.block_size
    console.print(
        f"{len(plan.roots())} recorded agent sessions, {plan.num_turns()} requests, "
        f"{plan.working_set_tokens():,} tokens of context on a server with room for {pool:,}.\n"
        "Each server below gets the same requests at the same pace; it takes a few minutes.",
        highlight=False,
    )
    chosen = arms.pick(",".join(ARMS))
    load = Load(spread_s=4.0)
    with TerminalWatcher(console, len(ARMS)) as watcher:
        trials = run_trials(plan, chosen, ARMS, machine, load, out / "logs", watcher)
    _figures(trials, console)
    _recognised(trials, console)
    (out / "runs.json").write_bytes(msgspec.json.format(msgspec.json.encode([asdict(t) for t in trials]), indent=1))
    page = out / "report.html"
    title = f"{len(plan.roots())} agents on a server with too little memory"
    report.write(Report(title, plan, tuple(chosen), tuple(trials), machine, SCALE, load), page)
    return Outcome(page, sum(t.measures.num_failed for t in trials))


def _figures(trials: list[Trial], console: Console) -> None:
    table = Table("", *(t.arm for t in trials), title="What the sessions felt", title_justify="left")
    for row in report.rows(trials):
        table.add_row(row.name, *row.cells)
    console.print(table)
    at_stake = report.stake(trials)
    if at_stake is not None and at_stake.impala is not None:
        console.print(
            f"A session waits {at_stake.stock.stall_mean_s:.1f} s for stock vLLM, {at_stake.impala.stall_mean_s:.1f} s "
            f"with impala, and {at_stake.unbounded.stall_mean_s:.1f} s where nothing is ever forgotten. One run "
            "each: figures to rely on are in RESULTS.md.\n",
            highlight=False,
        )


def _recognised(trials: list[Trial], console: Console) -> None:
    trial = next((t for t in trials if t.links is not None), None)
    if trial is None or trial.links is None:
        return
    rows = {t["trace_id"]: t for t in trial.traces}
    table = Table(
        Column("recorded session", overflow="fold"), "turns", "live trace", "its turns", "state", "turns right",
        Column("verdict", overflow="fold"),
        title="Recorded truth beside /impala/traces of the live server; no client sent an id", title_justify="left",
    )  # fmt: skip
    for s in trial.links.sessions:
        live = rows.get(s.trace_id or "", {})
        good = s.num_right == s.num_turns and s.parent_right is not False
        table.add_row(
            s.session_id, str(s.num_turns), s.trace_id or "-", str(live.get("turns", "-")),
            str(live.get("state", "-")), str(s.num_right), f"[{'green' if good else 'yellow'}]{verdict(s)}[/]",
        )  # fmt: skip
    console.print(table)
    console.print(f"link F1 {trial.links.f1:.3f} over {trial.links.num_requests} requests\n", highlight=False)
