"""What a ledger's traces would have cost under other policies: the newest of them, served again in virtual time.

Lengths, gaps and shared prefixes are the ledger's, room for KV is its header's; how long a step takes is a timing's.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from impala_vllm.config import ConfigError
from impala_vllm.insight.ledger.record import Header, Record
from impala_vllm.insight.ledger.turns import turns
from impala_vllm.sim import report
from impala_vllm.sim.client import Served
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.question import Asked, Question, ask
from impala_vllm.sim.simulation import Outcome, run
from impala_vllm.sim.timing import Timing
from impala_vllm.workload import WorkloadError

POLICIES = ("stock", "impala", "unbounded")


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """Simulated, not measured."""

    question: Question
    outcomes: Mapping[str, Outcome]
    num_traces: int
    start: float
    """Unix time of the first of them."""
    end: float

    @property
    def answer(self) -> str:
        """What impala saves against stock."""
        return report.saved(self.outcomes, self.question.setup.num_replicas) or ""

    def rows(self) -> list[tuple[str, list[report.Column]]]:
        """A policy and its figures."""
        return [(name, report.row(outcome)) for name, outcome in self.outcomes.items()]

    def document(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "simulated": True,
            "traces": self.num_traces,
            "start": self.start,
            "end": self.end,
            "config": self.question.describe_config(0),
            "policies": {name: asdict(outcome.measures) for name, outcome in self.outcomes.items()},
        }


class Impossible(Exception):
    """Why this ledger cannot be simulated, in one line."""


def simulate(
    records: Sequence[Record],
    headers: Mapping[str, Header],
    timing: Timing,
    on_served: Callable[[Served], None] | None = None,
) -> Counterfactual:
    """Serve the traces of the engine that most of `records` are of. Raises Impossible."""
    by_run = Counter(name for r in records if (name := r.trace.partition("/")[0]) in headers)
    if not by_run:
        raise Impossible("no trace in the ledger has both its rows of turns and the header of its server")
    name = by_run.most_common(1)[0][0]
    header = headers[name]
    chosen = {r.trace: r for r in records if r.trace.startswith(f"{name}/")}
    if not header.block or not header.hbm:
        raise Impossible("the header of the server names no block size or no room for KV")
    recorded = turns(chosen.values(), header.block)
    asked = Asked(timing, 1, header.host, header.nvme if header.host else 0, header.hbm)
    try:
        question = ask(recorded, asked)
    except (WorkloadError, ConfigError) as e:
        raise Impossible(str(e)) from e
    outcomes = {policy: run(question.workload, question.setup, KINDS[policy], on_served) for policy in POLICIES}
    start, end = min(r.start for r in chosen.values()), max(r.end for r in chosen.values())
    return Counterfactual(question, outcomes, len(chosen), start, end)
