"""Recorded sessions as chat requests that only ever grow: what changes are put into.

Trajectories grow as they are. Of a rendered agent trace those steps are taken that go on from the ones
before; each step's news is one message. Neither log has tool schemas, so some are made of the calls.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from impala_vllm.insight.audit.kinds import Kind, kinds
from impala_vllm.insight.audit.prompts import parts
from impala_vllm.insight.audit.requests import read
from impala_vllm.workload import WorkloadError
from impala_vllm.workload.source import fail

Request = dict[str, Any]

_PLAIN_TOOLS = ("think", "list_files", "read_file", "write_file", "run_command", "search")
MIN_TURNS = 4


@dataclass(frozen=True, slots=True)
class Session:
    """Requests of one session, in order."""

    name: str
    requests: list[Request]


def load(path: Path) -> list[Session]:
    """All sessions with at least `MIN_TURNS` turns. Raises WorkloadError where there is none."""
    prompts: dict[str, list[list[dict[str, Any]]]] = {}
    texts: dict[str, str] = {}
    for file, kind in kinds(path, fail):
        if not kind.is_text:
            raise WorkloadError(f"{file}: block ids, not messages; give a log of messages")
        for request in read(file, kind, fail):
            name = f"{file.name}:{request.session}"
            turns = prompts.setdefault(name, [])
            if kind is not Kind.STEPS:
                turns.append([msgspec.json.decode(m) for m in request.messages])
                continue
            text, before = request.text or "", texts.get(name, "")
            if text.startswith(before) and len(text) > len(before):
                fresh = [text[len(before) :]] if before else [part for _, part in parts(text)]
                turns.append([*map(dict, turns[-1] if turns else ()), *({"role": "user", "content": t} for t in fresh)])
                texts[name] = text
    found = [Session(name, _requests(name, turns)) for name, turns in prompts.items() if len(turns) >= MIN_TURNS]
    if not found:
        raise WorkloadError(f"{path}: no session of {MIN_TURNS} turns; give a longer log")
    return found


def write(path: Path, sessions: list[Session]) -> int:
    """As a messages log, one session after the other; returns its bytes."""
    with path.open("wb") as out:
        for session in sessions:
            for request in session.requests:
                out.write(json.dumps(request, ensure_ascii=False).encode(errors="replace") + b"\n")
        return out.tell()


def _requests(name: str, prompts: list[list[dict[str, Any]]]) -> list[Request]:
    tools = _tools(prompts[-1])
    return [
        {
            "request_id": f"{name}#{i}",
            "session_id": name,
            "arrival_s": float(i),
            "model": "m",
            "tools": tools,
            "messages": messages,
        }
        for i, messages in enumerate(prompts)
    ]


def _tools(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    arguments: dict[str, set[str]] = {name: {"path", "text"} for name in _PLAIN_TOOLS}
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call["function"]
            arguments.setdefault(function["name"], set()).update(json.loads(function["arguments"]))
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": f"Does {name.replace('_', ' ')} and says what came of it.",
                "parameters": {"type": "object", "properties": {key: {"type": "string"} for key in sorted(keys)}},
            },
        }
        for name, keys in arguments.items()
    ]
