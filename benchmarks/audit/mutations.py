"""Ways to break a prefix. Each changes a copy of a session and says what an audit should find there."""

import copy
import json
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, NamedTuple

from benchmarks.audit.sessions import Request
from impala_vllm.insight.audit import Cause

Message = dict[str, Any]


class Expected(NamedTuple):
    """What is to be found: the same in each of the turns (indices of requests)."""

    turns: frozenset[int]
    segment: str | None
    """None where it moves from turn to turn."""
    cause: Cause


Mutation = Callable[[Random, list[Request]], Expected | None]
"""Changes the requests in place; None where the session has nothing that it could change."""


def mutate(name: str, requests: list[Request], seed: int) -> tuple[list[Request], Expected] | None:
    """A changed copy."""
    changed = copy.deepcopy(requests)
    expected = MUTATIONS[name](Random(f"{seed} {name} {requests[0]['request_id']}"), changed)
    return None if expected is None else (changed, expected)


def _head(stamp: Callable[[Random, int], str], cause: Cause) -> Mutation:
    """A line at the head of the first message, another in every turn."""

    def change(random: Random, requests: list[Request]) -> Expected:
        for turn, request in enumerate(requests):
            first = request["messages"][0]
            first["content"] = f"{stamp(random, turn)}\n{first['content']}"
        return Expected(_all(requests), _label(requests[0]["messages"], 0), cause)

    return change


def _tools(change_tools: Callable[[Random, list[Any], int], list[Any]], cause: Cause, every: bool) -> Mutation:
    """Other tools in every turn, or from some turn on."""

    def change(random: Random, requests: list[Request]) -> Expected:
        at = 1 if every else random.randrange(1, len(requests))
        for turn in range(at, len(requests)):
            seed = random if every else Random(at)
            requests[turn]["tools"] = change_tools(seed, requests[turn]["tools"], turn)
        return Expected(_all(requests) if every else frozenset({at}), "tools", cause)

    return change


def _old(
    cause: Cause, fits: Callable[[Message], bool], change_message: Callable[[Message, Random], None], first: int = 1
) -> Mutation:
    """One message of the history is another one from some turn on."""

    def change(random: Random, requests: list[Request]) -> Expected | None:
        turns = list(range(1, len(requests)))
        random.shuffle(turns)
        for at in turns:
            before = requests[at - 1]["messages"]
            places = [i for i in range(first, len(before)) if fits(before[i])]
            if not places:
                continue
            place = random.choice(places)
            seed = random.random()
            label = _label(before, place)
            for request in requests[at:]:
                change_message(request["messages"][place], Random(seed))
            return Expected(frozenset({at}), label, cause)
        return None

    return change


def _history(cause: Cause, least: int, change_messages: Callable[[list[Message], int], int]) -> Mutation:
    """History before a turn is another from there on; `change_messages` gets how long it was, returns where."""

    def change(random: Random, requests: list[Request]) -> Expected | None:
        turns = [t for t in range(1, len(requests)) if len(requests[t - 1]["messages"]) >= least]
        if not turns:
            return None
        at = random.choice(turns)
        length = len(requests[at - 1]["messages"])
        places = [change_messages(request["messages"], length) for request in requests[at:]]
        return Expected(frozenset({at}), _label(requests[at]["messages"], places[0]), cause)

    return change


def _field(name: str, cause: Cause) -> Mutation:
    def change(random: Random, requests: list[Request]) -> Expected:
        at = random.randrange(1, len(requests))
        for request in requests[at:]:
            request[name] = "other"
        return Expected(frozenset({at}), "whole prompt", cause)

    return change


def _image(random: Random, requests: list[Request]) -> Expected:
    at = random.randrange(1, len(requests))
    for turn, request in enumerate(requests):
        url = f"data:image/png;base64,{'iVBORw0K' * 200}{'B' if turn >= at else 'A'}"
        parts = [{"type": "text", "text": "This is my screen:"}, {"type": "image_url", "image_url": {"url": url}}]
        request["messages"].insert(1, {"role": "user", "content": parts})
    return Expected(frozenset({at}), _label(requests[0]["messages"], 1), Cause.IMAGE)


def _reminder(random: Random, requests: list[Request]) -> Expected:
    for request in requests:
        request["messages"] = [*request["messages"], {"role": "user", "content": "Reminder: ask before you act on it."}]
    return Expected(_all(requests), None, Cause.INSERTED)


def _trim(messages: list[Message], length: int) -> int:
    del messages[1 : 1 + length // 3]
    return 1


def _compact(messages: list[Message], length: int) -> int:
    kept = messages[length - 2 :]
    messages[1:] = [
        {"role": "user", "content": "Summary of what was said: the user has told us what they want."},
        *kept,
    ]
    return 1


def _insert(messages: list[Message], length: int) -> int:
    messages.insert(length // 2, {"role": "user", "content": "Note: the policy above was checked and still holds."})
    return length // 2


def _edit(message: Message, random: Random) -> None:
    words = message["content"].split(" ")
    words[random.randrange(len(words) // 2, len(words))] = "something else altogether"
    message["content"] = " ".join(words)


def _rekey(message: Message, random: Random) -> None:
    for call in message["tool_calls"]:
        function = call["function"]
        function["arguments"] = json.dumps(dict(reversed(json.loads(function["arguments"]).items())))


def _indent(message: Message, random: Random) -> None:
    for call in message["tool_calls"]:
        function = call["function"]
        function["arguments"] = json.dumps(json.loads(function["arguments"]), separators=(" ,", " : "))


def _rekey_text(message: Message, random: Random) -> None:
    message["content"] = json.dumps(dict(reversed(json.loads(message["content"]).items())))


def _set(name: str, value: Callable[[Message], Any]) -> Callable[[Message, Random], None]:
    def change(message: Message, random: Random) -> None:
        message[name] = value(message)

    return change


def _drop(message: Message, random: Random) -> None:
    message.pop("name", None)


def _shuffled(random: Random, tools: list[Any], turn: int) -> list[Any]:
    """Rotated by the turn, then the rest shuffled: never the order of the turn before."""
    rest = [tool for i, tool in enumerate(tools) if i != turn % len(tools)]
    random.shuffle(rest)
    return [tools[turn % len(tools)], *rest]


def _text(least: int) -> Callable[[Message], bool]:
    return lambda m: isinstance(m.get("content"), str) and len(m["content"].strip()) >= least


def _has_arguments(message: Message) -> bool:
    calls = message.get("tool_calls") or ()
    return any(len(json.loads(call["function"]["arguments"])) >= 2 for call in calls)


def _holds_json(message: Message) -> bool:
    try:
        value = json.loads(message.get("content") or "")
    except (ValueError, TypeError):
        return False
    return isinstance(value, dict) and len(value) >= 2 and json.dumps(value) == message["content"]


def _all(requests: list[Request]) -> frozenset[int]:
    return frozenset(range(1, len(requests)))


def _label(messages: list[Message], place: int) -> str:
    return "system" if messages[place].get("role") in ("system", "developer") else f"message {place + 1}"


def _when(turn: int) -> datetime:
    return datetime(2026, 11, 24, 9, 58, 41, tzinfo=UTC) + timedelta(seconds=turn * 73)


def _tool(random: Random, tools: list[Any], turn: int) -> list[Any]:
    return [*tools, {"type": "function", "function": {"name": "transfer", "parameters": {"type": "object"}}}]


MUTATIONS: dict[str, Mutation] = {
    "UUID at the head": _head(lambda r, t: f"session {uuid.UUID(int=r.getrandbits(128))}", Cause.NONCE),
    "hex id at the head": _head(lambda r, t: f"trace={r.getrandbits(64):016x}", Cause.NONCE),
    "ISO time at the head": _head(lambda r, t: f"Now: {_when(t).isoformat()}", Cause.TIMESTAMP),
    "written time at the head": _head(lambda r, t: f"It is {_when(t):%A, %d %B %Y, %I:%M %p}.", Cause.TIMESTAMP),
    "epoch at the head": _head(lambda r, t: f"ts {_when(t).timestamp():.3f}", Cause.TIMESTAMP),
    "count at the head": _head(lambda r, t: f"Step {t + 1}, {40 - t} left.", Cause.COUNTER),
    "tools shuffled": _tools(_shuffled, Cause.TOOLS_REORDERED, every=True),
    "tool added": _tools(_tool, Cause.TOOLS_CHANGED, every=False),
    "tool removed": _tools(lambda r, tools, t: tools[:-1], Cause.TOOLS_CHANGED, every=False),
    "keys of schemas moved": _tools(
        lambda r, tools, t: [dict(reversed(tool.items())) for tool in tools], Cause.JSON_KEYS, every=False
    ),
    "keys of arguments moved": _old(Cause.JSON_KEYS, _has_arguments, _rekey),
    "keys of a result moved": _old(Cause.JSON_KEYS, _holds_json, _rekey_text),
    "trailing space": _old(Cause.WHITESPACE, _text(8), _set("content", lambda m: m["content"] + " ")),
    "line ends": _old(
        Cause.WHITESPACE,
        lambda m: _text(8)(m) and "\n" in m["content"].replace("\r\n", ""),
        _set("content", lambda m: m["content"].replace("\r\n", "\n").replace("\n", "\r\n")),
        first=0,
    ),
    "spaces in arguments": _old(Cause.WHITESPACE, _has_arguments, _indent),
    "role renamed": _old(
        Cause.RERENDERED, lambda m: m.get("role") == "system", _set("role", lambda m: "developer"), first=0
    ),
    "field dropped": _old(Cause.RERENDERED, lambda m: _text(1)(m) and "name" in m, _drop),
    "history trimmed": _history(Cause.TRIMMED, 4, _trim),
    "history summed up": _history(Cause.COMPACTED, 5, _compact),
    "message inserted": _history(Cause.INSERTED, 3, _insert),
    "reminder moved along": _reminder,
    "result shortened": _old(
        Cause.TRIMMED, _text(300), _set("content", lambda m: m["content"][:60] + " [cut]")
    ),
    "message edited": _old(Cause.EDITED, _text(40), _edit, first=0),
    "image changed": _image,
    "model changed": _field("model", Cause.MODEL),
    "salt changed": _field("cache_salt", Cause.SALT),
}  # fmt: skip
"""By what they do, in the order in which they are shown."""
