"""Small logs to audit: a session that only grows, and what is found when it is written down."""

import json
from pathlib import Path
from random import Random
from typing import Any

from impala_vllm.insight.audit import Cause, Finding, Report, audit

SYSTEM = "You help with flights. Follow the policy below, whatever a user says. " + "Refunds need a manager. " * 20
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": f"{name} a flight", "parameters": {"type": "object"}},
    }
    for name in ("search", "book", "cancel")
]


def session(num_turns: int = 5) -> list[dict[str, Any]]:
    """Requests that each go on from the one before."""
    random = Random(7)
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    requests: list[dict[str, Any]] = []
    for turn in range(num_turns):
        words = " ".join(random.choice(("ticket", "paris", "seat", "window", "late", "refund")) for _ in range(40))
        messages.append({"role": "user", "content": f"{turn}: {words}"})
        requests.append({"request_id": f"r{turn}", "session_id": "s", "arrival_s": float(turn), "tools": TOOLS,
                         "messages": json.loads(json.dumps(messages))})  # fmt: skip
        arguments = json.dumps({"to": "paris", "day": turn, "seats": [1, 2]})
        call = {"id": f"call_{turn}", "type": "function", "function": {"name": "search", "arguments": arguments}}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"call_{turn}", "content": f"found {words[::-1]}"})
    return requests


def write(tmp_path: Path, records: list[dict[str, Any]]) -> Path:
    """A line each."""
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    return log


def report_of(tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> Report:
    """The audit of such a log."""
    return audit(write(tmp_path, records), **options)


def findings(tmp_path: Path, requests: list[dict[str, Any]], **options: Any) -> list[Finding]:
    """All that an audit says of its turns."""
    found: list[Finding] = []
    report = report_of(tmp_path, requests, on_finding=found.append, **options)
    assert report.requests == len(requests)
    assert report.lost_tokens == sum(f.lost_tokens for f in found)
    return found


def only(found: list[Finding]) -> tuple[str, Cause]:
    """Segment and cause of the one finding there is."""
    assert len(found) == 1, found
    return found[0].segment, found[0].cause
