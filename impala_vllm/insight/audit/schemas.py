"""What tool schemas weigh, and which tools nobody ever called."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from impala_vllm.insight.audit.segment import json_bytes


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool over the whole log."""

    name: str
    schema_bytes: int
    """Of its longest schema."""
    num_requests: int
    """That carried it."""
    num_calls: int


class Schemas:
    """Counts tools as requests are read. Memory: a few numbers a tool name."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._requests: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()

    def learn(self, tools: list[Any]) -> tuple[str, ...]:
        """Their names and sizes; give the names to `carried` for each request."""
        names: list[str] = []
        for tool in tools:
            name = _name(tool)
            if name:
                names.append(name)
                self._sizes[name] = max(self._sizes.get(name, 0), json_bytes(tool))
        return tuple(names)

    def carried(self, names: Iterable[str]) -> None:
        """A request had these tools."""
        self._requests.update(names)

    def called(self, message: Any) -> None:
        """Count the calls in a message, seen for the first time in its session."""
        if not isinstance(message, dict):
            return
        calls = cast("dict[str, Any]", message).get("tool_calls")
        for call in cast("list[Any]", calls) if isinstance(calls, list) else ():
            name = _name(call)
            if name:
                self._calls[name] += 1

    def tools(self) -> list[Tool]:
        """All of them, heaviest first."""
        found = [Tool(n, size, self._requests[n], self._calls[n]) for n, size in self._sizes.items()]
        return sorted(found, key=lambda t: (-t.schema_bytes * t.num_requests, t.name))


def _name(tool: Any) -> str | None:
    """As OpenAI writes it (below `function`), or plain."""
    if not isinstance(tool, dict):
        return None
    fields = cast("dict[str, Any]", tool)
    inner = fields.get("function")
    name = cast("dict[str, Any]", inner).get("name") if isinstance(inner, dict) else fields.get("name")
    return name if isinstance(name, str) else None
