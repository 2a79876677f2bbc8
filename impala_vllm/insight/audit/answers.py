"""An answer against the same answer in the next prompt: where they differ, the KV that the engine has made is lost."""

import json
from typing import Any, cast

from impala_vllm.insight.audit.causes import Cause
from impala_vllm.insight.audit.compare import Prompt, variant
from impala_vllm.insight.audit.segment import Segment

_START_CHARS = 24
_AHEAD_CHARS = 400
"""Of a rendered prompt: markers and a name may stand before the answer."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def recorded(output: Any) -> Segment | None:
    """A recorded output as it should stand in the next prompt; None where that cannot be said."""
    if isinstance(output, str):
        return Segment("assistant", output) if output.strip() else None
    if not isinstance(output, dict):
        return None
    fields = cast("dict[str, Any]", output)
    content = fields.get("content")
    if content is not None and not isinstance(content, str):
        return None
    calls = fields.get("tool_calls")
    said = _calls(calls) if isinstance(calls, list) else ""
    thoughts = "".join(str(fields[name]) for name in _THOUGHTS if isinstance(fields.get(name), str))
    return Segment("assistant", f"{thoughts}\x1e{content or ''}" if thoughts else content or "", said)


def is_due(before: Prompt, now: Prompt) -> bool:
    """Whether `now`, which begins with `before`, goes on after it: then what is new should begin with the answer."""
    at = len(before.segments)
    if now.tail_chars is None:
        return len(now.segments) > at
    return len(now.segments) > at or now.segments[at - 1].num_bytes > before.segments[-1].num_bytes


def is_there(before: Prompt, now: Prompt) -> bool:
    """Whether the answer, or what may be one, stands where it should."""
    at = len(before.segments)
    if now.tail_chars is None:
        return now.segments[at].role == "assistant"
    if before.answer is None:
        return False
    ahead = sum(len(s.body) for s in before.segments)
    start = before.answer.text.strip()[:_START_CHARS]
    text = "".join(s.body for s in now.segments)
    return text.find(start, ahead, ahead + _AHEAD_CHARS + len(start)) >= 0


def difference(answer: Segment, history: Segment) -> tuple[Cause, int] | None:
    """Why the answer in history is another one, and the bytes that are computed again. None where it is none."""
    if history.role != "assistant":
        return None
    fields = cast("dict[str, Any]", json.loads(history.extra)) if history.extra else {}
    calls = fields.get("tool_calls")
    if calls and not answer.extra:
        return None  # text as the model wrote it, calls and all: not comparable
    thoughts = "".join(str(fields[name]) for name in _THOUGHTS if isinstance(fields.get(name), str))
    text = f"{thoughts}\x1e{history.text}" if thoughts else history.text
    there = Segment("assistant", text, _calls(calls) if isinstance(calls, list) else "")
    if there.exact == answer.exact:
        return None
    if not thoughts and "\x1e" in answer.text and answer.text.partition("\x1e")[2] == text:
        return Cause.RERENDERED, there.num_bytes
    return variant(answer, there)


def _calls(calls: list[Any]) -> str:
    """Names and arguments: ids and indices are a server's own."""
    said: list[Any] = []
    for call in calls:
        function = cast("dict[str, Any]", call).get("function") if isinstance(call, dict) else None
        inner = cast("dict[str, Any]", function) if isinstance(function, dict) else {}
        said.append([inner.get("name"), inner.get("arguments")])
    return json.dumps(said, ensure_ascii=False, separators=(",", ":")) if said else ""
