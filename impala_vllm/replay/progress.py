"""Progress of trials on a terminal, or a line now and then where there is none."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from impala_vllm.replay.load import TurnResult
from impala_vllm.replay.trial import Trial


class TerminalWatcher:
    """A bar a run. Use as a context manager."""

    def __init__(self, console: Console, num_runs: int) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._num_runs = num_runs
        self._task = self._progress.add_task("", total=None, visible=False)
        self._run = 0
        self._said: str | None = None

    def __enter__(self) -> "TerminalWatcher":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def starting(self, arm: str, waited_s: float) -> None:
        what = f"starting vLLM: {arm}"
        if self._said != what:
            self._said = what
            self._progress.reset(self._task, description=what, total=None, visible=True)
            self._plain(f"{what} (half a minute)")

    def running(self, arm: str, repetition: int, num_turns: int) -> None:
        self._run += 1
        what = f"run {self._run} of {self._num_runs}: {arm}"
        self._progress.reset(self._task, description=what, total=num_turns, completed=0, visible=True)
        self._plain(f"{what}, {num_turns} requests")

    def turn(self, result: TurnResult) -> None:
        self._progress.advance(self._task)
        if result.error is not None:
            self._console.print(f"  request {result.recorded_id} failed: {result.error}", markup=False)

    def ended(self, trial: Trial) -> None:
        m = trial.measures
        failed = f", [red]{m.num_failed} failed[/red]" if m.num_failed else ""
        f1 = "" if trial.links is None else f", link F1 {trial.links.f1:.3f}"
        self._console.print(
            f"  {trial.arm}: {m.makespan_s:.0f} s, {m.tasks_per_hour:.0f} tasks/h, JCT {m.jct_mean_s:.1f} s, "
            f"stall {m.stall_mean_s:.1f} s, cached {m.cached_share:.0%}{f1}{failed}",
            highlight=False,
        )

    def _plain(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, highlight=False)
