"""A run as a Chrome trace (chrome://tracing, ui.perfetto.dev): a process a policy, a row a replica and a session."""

import json
from collections.abc import Iterable
from typing import Any

from impala_vllm.sim.client import Served
from impala_vllm.sim.replica import Step


class ChromeTrace:
    """Collects; `text` gives the file. Times are in microseconds there."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._process = 0

    def policy(self, name: str) -> None:
        """What is noted from here on is this policy's."""
        self._process += 1
        self._name("process_name", 0, name)

    def step(self, replica: int, step: Step) -> None:
        """A step of a replica."""
        what = "prefill" if step.prompt_tokens else "decode"
        self._span(what, replica + 1, step.start_s, step.end_s,
                   {"prompt tokens": step.prompt_tokens, "decoding": step.num_decoding})  # fmt: skip

    def turns(self, served: Iterable[Served], num_replicas: int) -> None:
        """Every turn: until its first token, then until its end."""
        for number in range(num_replicas):
            self._name("thread_name", number + 1, f"replica {number}")
        rows: dict[str, int] = {}
        for turn in served:
            row = rows.get(turn.session_id)
            if row is None:
                row = rows[turn.session_id] = num_replicas + 1 + len(rows)
                self._name("thread_name", row, turn.session_id)
            about = {"turn": turn.index, "prompt tokens": turn.prompt_tokens, "cached": turn.cached_tokens}
            self._span("wait", row, turn.start_s, turn.first_s, {**about, "held s": turn.held_s})
            self._span("answer", row, turn.first_s, turn.end_s, {"output tokens": turn.output_tokens})

    def text(self) -> str:
        return json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}, separators=(",", ":"))

    def _span(self, name: str, row: int, start_s: float, end_s: float, args: dict[str, Any]) -> None:
        self._events.append(
            {
                "ph": "X",
                "name": name,
                "pid": self._process,
                "tid": row,
                "ts": start_s * 1e6,
                "dur": (end_s - start_s) * 1e6,
                "args": args,
            }
        )

    def _name(self, what: str, row: int, name: str) -> None:
        self._events.append({"ph": "M", "name": what, "pid": self._process, "tid": row, "args": {"name": name}})
