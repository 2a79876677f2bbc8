"""Gathers a ledger in one pass: the newest record of each trace, as columns of numbers.

A trace's records are cumulative and later ones replace earlier ones. Some 350 bytes a trace: a million fit into
400 MB. The newest traces are kept whole, for the simulator.
"""

from array import array
from collections import deque
from dataclasses import dataclass

import msgspec

from impala_vllm.insight.ledger.record import Header, Line, Record, Stored, Tokens, Unlinked

OPEN = frozenset({"running", "silent"})
"""Inferred outcomes of traces that may well go on."""
PHASES = ("hold", "queue", "load", "prefill", "decode")
SOURCES = ("computed", "hbm", "host", "nvme", "other")
CAUSES = ("evicted", "rewritten", "bypassed", "preempted")
MAX_WHOLE_TURNS = 4000
"""Rows of turns kept for the simulator: half a minute of it."""

_ROWS_AT_ONCE = 4096
_NO_ROWS = b"[]"

_COLUMNS = ("start", "end", "gap_s", "gpu_s", "turns", "output", *PHASES, *SOURCES, *CAUSES, "failures", "is_task")


@dataclass(slots=True)
class Run:
    """One start of one engine."""

    header: Header | None = None
    start: float = float("inf")
    end: float = float("-inf")
    traces: int = 0

    @property
    def gpus(self) -> int:
        """Devices; one where the header is gone."""
        return self.header.gpus if self.header is not None else 1


class Totals:
    """`add` every line in order; then read `columns`, by trace, in order of `names`."""

    def __init__(self) -> None:
        self.columns: dict[str, array[float]] = {name: array("d") for name in _COLUMNS}
        self.runs: dict[str, Run] = {}
        self.unlinked: dict[str, Unlinked] = {}
        """By run."""
        self.outcomes: list[str] = []
        self.reported = bytearray()
        """1: the client said how the trace ended."""
        self.superseded = 0
        self._newest: deque[Stored] = deque()
        """Traces whose rows are there."""
        self._newest_turns = 0
        self._rows: list[tuple[float, ...]] = []
        """Not in the columns yet: they grow by many at a time."""
        self._index: dict[str, int] = {}
        self._labels: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._index)

    def names(self) -> list[str]:
        """Of the traces, by index."""
        return list(self._index)

    def add(self, line: Line) -> None:
        """Take in a line. Of two records of a trace the one that ends later counts."""
        if isinstance(line, Stored):
            self._add(line)
        elif isinstance(line, Header):
            run = self._run(line.run)
            run.header = line
        else:
            self.unlinked[line.run] = line
            run = self._run(line.run)
            run.end = max(run.end, line.end)

    def unlinked_tokens(self) -> Tokens:
        """Of requests without a trace, over all runs."""
        found = [u.tokens for u in self.unlinked.values()]
        return Tokens(*(sum(getattr(t, name) for t in found) for name in Tokens.__struct_fields__))

    def settle(self) -> None:
        """Bring the columns up to date; `add` leaves some lines for later."""
        if self._rows:
            for column, values in zip(self.columns.values(), zip(*self._rows, strict=True), strict=True):
                column.extend(values)
            self._rows.clear()

    def whole(self) -> list[Record]:
        """The newest traces whose rows are there, with them."""
        found: list[Record] = []
        for record in self._newest:
            try:
                found.append(record.whole())
            except msgspec.DecodeError:  # rows of somebody else's: the figures stand
                continue
        return found

    def _add(self, record: Stored) -> None:
        name = record.trace
        run = self._run(name[: name.find("/")])
        start, end = record.start, record.end
        if start < run.start:
            run.start = start
        if end > run.end:
            run.end = end
        outcome = self._labels.setdefault(record.outcome, record.outcome)
        tokens, again, stall = record.tokens, record.again, record.stall
        is_task = record.parent is None and outcome not in OPEN and record.turns > 0
        row = (
            start, end, record.gap_s, record.gpu_s, record.turns, tokens.output,
            stall.hold, stall.queue, stall.load, stall.prefill, stall.decode,
            tokens.computed, tokens.hbm, tokens.host, tokens.nvme, tokens.other,
            again.evicted, again.rewritten, again.bypassed, again.preempted, record.failures, is_task,
        )  # fmt: skip
        number = len(self._index)
        index = self._index.setdefault(name, number)
        if index == number:
            run.traces += 1
            self._rows.append(row)
            if len(self._rows) >= _ROWS_AT_ONCE:
                self.settle()
            self.outcomes.append(outcome)
            self.reported.append(record.reported)
        else:
            self.superseded += 1
            self.settle()
            newest = self.columns["end"][index]
            if end < newest or (end == newest and record.live):
                return  # FILE.live is a little behind
            for column, value in zip(self.columns.values(), row, strict=True):
                column[index] = value
            self.outcomes[index], self.reported[index] = outcome, record.reported
        if len(record.log) > len(_NO_ROWS):
            self._keep(record)

    def _run(self, name: str) -> Run:
        run = self.runs.get(name)
        if run is None:
            run = self.runs[name] = Run()
        return run

    def _keep(self, record: Stored) -> None:
        self._newest.append(record)
        self._newest_turns += record.turns
        while self._newest_turns > MAX_WHOLE_TURNS and len(self._newest) > 1:
            self._newest_turns -= self._newest.popleft().turns
