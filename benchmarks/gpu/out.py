"""What a step says and finds: lines on the terminal, records in a file, facts for later steps."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from benchmarks import record
from benchmarks.record import Origin


class Skipped(Exception):
    """A step that has nothing to do here, with the reason in one line."""


@dataclass
class Out:
    """One step's. `directory` is the run's: all steps write there."""

    step: str
    directory: Path
    terminal: TextIO
    origin: Origin
    is_rehearsal: bool = False

    def line(self, text: str) -> None:
        print(f"  {self.step}: {text}", file=self.terminal, flush=True)

    def figure(
        self,
        question: str,
        variant: str,
        metric: str,
        unit: str,
        values: Sequence[float],
        *,
        better: str,
        **params: Any,
    ) -> float:
        """Record a figure over its repetitions; returns the median."""
        source, about = "rehearsal" if self.is_rehearsal else "measured", {**params, "step": self.step}
        made = self.origin.record(question, variant, about, metric, unit, better, values, source=source, seed=0)
        record.append([made], self.directory)
        return made.p50

    def note(self, **facts: Any) -> None:
        """Remember facts for later steps of this run."""
        known = {**self.facts(), **facts}
        draft = self._facts.with_suffix(".draft")
        draft.write_text(json.dumps(known, indent=1), encoding="utf-8")
        draft.replace(self._facts)

    def facts(self) -> dict[str, Any]:
        """What earlier steps noted."""
        try:
            return json.loads(self._facts.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    @property
    def _facts(self) -> Path:
        return self.directory / "facts.json"


def origin(machine: str | None) -> Origin:
    """Of this process. `machine` names the accelerator; the commit may come from the environment, where the
    tree has no history."""
    found = record.origin(os.environ.get("IMPALA_GPU_COMMAND"))
    commit = os.environ.get("IMPALA_GPU_COMMIT") or found.commit
    return replace(found, commit=commit, machine=found.machine if machine is None else f"{machine}, {found.machine}")
