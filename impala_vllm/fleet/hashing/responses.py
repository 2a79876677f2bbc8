"""A request of /v1/responses as the chat that vLLM makes of it before anything is rendered.

Mirrors the text side of vLLM 0.32's `entrypoints/openai/responses/utils.py`. Where a request has what is not mirrored
(a stored answer, custom tools and their calls, namespaces, encrypted reasoning, an answer to be continued), it is None.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

JsonObject: TypeAlias = Mapping[str, Any]

_NOT_MIRRORED = ("previous_response_id", "previous_input_messages", "prompt")
_TOOLS_NOT_MIRRORED = ("custom", "namespace")
"""Other kinds than functions never reach the model."""


def chat_of(body: JsonObject) -> dict[str, Any] | None:
    """A body of /v1/chat/completions with the same prompt."""
    if any(body.get(name) for name in _NOT_MIRRORED):
        return None
    reasoning: Any = body.get("reasoning")
    functions, messages = _functions(body.get("tools")), _messages(body.get("input"))
    if functions is None or messages is None or not isinstance(reasoning, dict | None):
        return None
    instructions = body.get("instructions")
    system = [{"role": "system", "content": instructions}] if instructions else []
    return {
        "messages": [*system, *messages],
        "tools": functions if body.get("tools") else None,  # with built-in ones alone an empty list, as in vLLM
        "tool_choice": body.get("tool_choice"),
        "reasoning_effort": cast("JsonObject", reasoning or {}).get("effort"),
        "chat_template_kwargs": body.get("chat_template_kwargs"),
        "media_io_kwargs": body.get("media_io_kwargs"),
        "mm_processor_kwargs": body.get("mm_processor_kwargs"),
        "cache_salt": body.get("cache_salt"),
    }


def _functions(tools: Any) -> list[dict[str, Any]] | None:
    if not isinstance(tools, list | None):
        return None
    functions: list[dict[str, Any]] = []
    for tool in cast("list[Any]", tools or []):
        if not isinstance(tool, dict) or (one := cast("JsonObject", tool)).get("type") in _TOOLS_NOT_MIRRORED:
            return None
        if one.get("type") == "function":
            functions.append({"type": "function", "function": one})
    return functions


def _messages(given: Any) -> list[dict[str, Any]] | None:
    """Several items may make one message: what the model thought, said and called in one turn."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        return None
    messages: list[dict[str, Any]] = []
    for item in cast("list[Any]", given):
        if not isinstance(item, dict):
            return None
        one = _message(cast("JsonObject", item))
        if one is None:
            return None
        before = messages[-1] if messages else {}
        joins = before.get("role") == one["role"] == "assistant"
        if joins and "tool_calls" in one:
            before.setdefault("tool_calls", []).extend(one["tool_calls"])
        elif joins and all(before.get(name) is None for name in one if name != "role"):
            before.update(one)
        else:
            messages.append(one)
    last = cast("JsonObject", given[-1])
    is_said = last.get("type", "message") in ("message", "reasoning")
    return None if is_said and last.get("status") in ("in_progress", "incomplete") else messages


def _message(item: JsonObject) -> dict[str, Any] | None:
    kind, role = item.get("type", "message"), item.get("role")
    if kind == "function_call":
        return _call(item)
    if kind == "function_call_output":
        return {"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")}
    if kind == "reasoning":
        text = _thought(item)
        return {"role": "assistant", "reasoning": text} if text is not None else None
    if kind != "message" or not isinstance(role, str):
        return None
    if role != "assistant":
        return {"role": role, "content": item.get("content")}
    text = _said(item.get("content"))
    return {"role": "assistant", "content": text} if text is not None else None


def _call(item: JsonObject) -> dict[str, Any] | None:
    if item.get("namespace") or not all(isinstance(item.get(name), str) for name in ("call_id", "name", "arguments")):
        return None
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"role": "assistant", "tool_calls": [{"id": item["call_id"], "function": function, "type": "function"}]}


def _thought(item: JsonObject) -> str | None:
    """The first part of the content, or of the summary; empty without either."""
    content, summary = item.get("content"), item.get("summary")
    if item.get("encrypted_content") or not isinstance(content, list | None) or not isinstance(summary, list):
        return None
    parts = cast("list[Any]", content or summary)
    return _text(parts[0]) if parts else ""


def _said(content: Any) -> str | None:
    """The first part of an answer: vLLM looks at no other."""
    if isinstance(content, str):
        return content
    return _text(cast("list[Any]", content)[0]) if isinstance(content, list) and content else None


def _text(part: Any) -> str | None:
    text = cast("JsonObject", part).get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else None
