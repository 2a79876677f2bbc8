"""A chat as vLLM hands it to the chat template: what it drops, joins and renames on the way.

Mirrors the text side of vLLM 0.32's `renderers/chat_utils.py` and `hf.py`. Where a request has what is not mirrored
(media, documents, templates of its own), the answer is None and the request is routed without its hashes.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias, cast

import msgspec

JsonObject: TypeAlias = Mapping[str, Any]

_BILLING = "x-anthropic-billing-header"
_TEXT_PARTS = ("text", "input_text", "output_text")
_LOOPS_OVER_CONTENT = re.compile(r"\{%-?\s*for\s+\w+\s+in\s+\w+(\.content|\[['\"]content['\"]\])")
_NOT_MIRRORED = (
    "documents",
    "chat_template",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "continue_final_message",
    "echo",
)
_ARGUMENTS = frozenset(
    (
        *("chat_template", "tokenize", "conversation", "messages", "tools", "documents", "continue_final_message"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
        "return_assistant_tokens_mask",
    )
)
"""What a call of the renderer takes beside variables: nothing of it is a client's to set."""
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
MAX_PRINTED_BYTES = 32 << 20
"""Of a client's variables, were each message and tool to print all of them."""
MAX_NUMBER = 1 << 20
"""In a client's variables: a template may repeat a text so often."""


def takes_parts(template: str) -> bool:
    """Whether the template goes through a message's content part by part, rather than printing it."""
    return bool(_LOOPS_OVER_CONTENT.search(template))


def messages_of(body: JsonObject, template: str) -> list[dict[str, Any]] | None:
    """The conversation for the template."""
    messages = body.get("messages")
    if not isinstance(messages, list) or any(body.get(name) for name in _NOT_MIRRORED):
        return None
    in_parts = takes_parts(template)
    shaped: list[dict[str, Any]] = []
    for message in cast("list[Any]", messages):
        if not isinstance(message, dict):
            return None
        one = _message(cast("JsonObject", message), in_parts)
        if one is None:
            return None
        shaped.append(one)
    if any(m["role"] == "developer" for m in shaped) and not re.search(r"""["']developer["']""", template):
        return _with_system(shaped)
    return shaped


def tools_of(body: JsonObject) -> list[dict[str, Any]] | None:
    """The tools for the template, in vLLM's order of fields; None without any. Raises ValueError for malformed ones."""
    tools = body.get("tools")
    if tools is None:
        return None
    try:
        return [_tool(tool) for tool in tools]
    except (TypeError, KeyError, AttributeError) as e:
        raise ValueError("malformed tools") from e


@lru_cache(maxsize=16)
def names_in(template: str) -> frozenset[str]:
    """The variables that a template looks at; none of one that is no template."""
    import jinja2
    from jinja2 import meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template))))
    except jinja2.TemplateError:
        return frozenset()


def variables_of(body: JsonObject, names: Collection[str]) -> dict[str, Any]:
    """What else a template that looks at `names` is given.

    Raises ValueError for what vLLM refuses, and for what could make a text without bounds of a short request.
    """
    own: Any = body.get("chat_template_kwargs")
    if not isinstance(own, dict | None) or _ARGUMENTS & (own or {}).keys():
        raise ValueError("not for a client to set")
    given: dict[str, Any] = dict(cast("JsonObject", own or {}))
    effort, prompts = body.get("reasoning_effort"), body.get("add_generation_prompt", True)
    if not isinstance(prompts, bool):
        raise ValueError("malformed add_generation_prompt")
    if effort is not None:
        given = {"enable_thinking": effort != "none", **given, "reasoning_effort": effort}
    given = {name: value for name, value in given.items() if name in names}
    tools = body.get("tools")
    num_printed = 1 + len(body["messages"]) + (len(cast("list[Any]", tools)) if isinstance(tools, list) else 0)
    if len(msgspec.json.encode(given)) * num_printed > MAX_PRINTED_BYTES or _has_large_number(given):
        raise ValueError("too much to print")
    return {**given, "add_generation_prompt": prompts}


def _has_large_number(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_large_number, cast("JsonObject", value).values()))
    if isinstance(value, list):
        return any(map(_has_large_number, cast("list[Any]", value)))
    return isinstance(value, int | float) and not abs(value) <= MAX_NUMBER


def _tool(tool: Any) -> dict[str, Any]:
    function = tool["function"]
    fields = {"name": function["name"], "description": function.get("description")}
    fields["parameters"] = function.get("parameters")
    for name in ("strict", "defer_loading"):
        if function.get(name) is not None:
            fields[name] = function[name]
    return {"type": "function", "function": fields}


def _message(message: JsonObject, in_parts: bool) -> dict[str, Any] | None:
    role = message.get("role")
    texts = _texts(message.get("content"))
    if not isinstance(role, str) or texts is None:
        return None
    if role == "system":
        texts = [kept for text in texts if (kept := _without_billing(text)) is not None]
    content: Any = (
        [{"type": "text", "text": text} for text in texts] if in_parts and role != "tool" else "\n".join(texts)
    )
    shaped: dict[str, Any] = {"role": role, "content": content}
    if role == "assistant":
        if message.get("tool_calls") is not None:
            calls = _calls(message["tool_calls"])
            if calls is None:
                return None
            if calls:
                shaped["tool_calls"] = calls
        if message.get("reasoning") is not None:
            shaped["reasoning"] = shaped["reasoning_content"] = message["reasoning"]
    elif role == "tool" and "tool_call_id" in message:
        shaped["tool_call_id"] = message["tool_call_id"]
    shaped.update({name: message[name] for name in ("name", "task") if isinstance(message.get(name), str)})
    if role == "developer":
        shaped["tools"] = message.get("tools")
    return shaped


def _texts(content: Any) -> list[str] | None:
    """The text parts; None where there are others."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return None
    texts: list[str] = []
    for part in cast("Sequence[Any]", content):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and (one := cast("JsonObject", part)).get("type") in _TEXT_PARTS:
            if isinstance(text := one.get("text"), str):
                texts.append(text)
        else:
            return None
    return texts


def _calls(calls: Any) -> list[dict[str, Any]] | None:
    if not isinstance(calls, list):
        return None
    shaped: list[dict[str, Any]] = []
    for call in cast("list[Any]", calls):
        if not isinstance(call, dict) or not isinstance((one := cast("JsonObject", call)).get("function"), dict):
            return None
        function = cast("JsonObject", one["function"])
        shaped.append({**one, "function": {**function, "arguments": _arguments(function.get("arguments"))}})
    return shaped


def _arguments(arguments: Any) -> Any:
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return {}
    return cast("JsonObject", arguments) if isinstance(arguments, dict) else {}


def _without_billing(text: str) -> str | None:
    """Claude Code's attribution line differs every time, so vLLM drops it."""
    return (text.partition("\n")[2] or None) if text.startswith(_BILLING) else text


def _with_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Developer messages as system messages, all of which become one at the front, where there are several."""
    shaped: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "developer":
            message = {name: value for name, value in message.items() if name != "tools"} | {"role": "system"}
        shaped.append(message)
    places = [i for i, message in enumerate(shaped) if message["role"] == "system"]
    if places in ([], [0]):
        return shaped
    contents: list[Any] = [shaped[i]["content"] for i in places]
    texts = [c if isinstance(c, str) else "\n".join(part["text"] for part in c) for c in contents]
    first = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [first, *(message for message in shaped if message["role"] != "system")]
