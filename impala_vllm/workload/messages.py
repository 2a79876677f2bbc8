"""Logs that hold what was said: chat requests, agent traces, trajectories (`--format messages`).

Three kinds: one OpenAI chat request a line (DESIGN of the messages log); LMCache agent traces
(github.com/LMCache/lmcache-agent-trace: rendered input and output a line, one session a file, time
stamps in whatever unit the stack writes); tau-bench trajectories (github.com/sierra-research/tau-bench:
a JSON array of whole conversations without times).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from impala_vllm.workload.source import BAD_JSON, OnError, WorkloadError, bad_line, records, whole
from impala_vllm.workload.text_blocks import BLOCK_TOKENS, block_ids, num_tokens, render
from impala_vllm.workload.turn import Turn

TAU_TURN_S = 5.0
"""Trajectories have no times: their turns are this far apart, about what a short chat turn takes."""


class _Chat(msgspec.Struct):
    request_id: str
    arrival_s: float
    messages: list[dict[str, Any]]
    session_id: str | None = None
    finish_s: float | None = None
    model: str | None = None
    tenant: str | None = None
    tools: list[Any] | None = None
    response_format: Any = None
    output: Any = None
    trace_id: str | None = None
    parent_trace_id: str | None = None


class _Step(msgspec.Struct):
    timestamp: float
    input: str
    output: str = ""
    session_id: str = ""
    model: str | None = None


class _Trajectory(msgspec.Struct):
    task_id: int | str
    traj: list[dict[str, Any]]
    trial: int = 0


def read_chats(file: Path, on_error: OnError, block_tokens: int = BLOCK_TOKENS) -> Iterator[Turn]:
    """Turns of a log of OpenAI chat requests."""
    seen: set[str] = set()
    for record, where in records(file, msgspec.json.Decoder(_Chat), on_error):
        answer = _answer(record.output)
        problem = _problem(record, answer, seen)
        if problem is not None or answer is None:
            on_error(WorkloadError(f"{where}: {problem}"))
            continue
        seen.add(record.request_id)
        prompt = render(record.messages, record.tools, record.response_format)
        blocks = block_ids(prompt, block_tokens)
        yield Turn(
            request_id=record.request_id,
            arrival_s=record.arrival_s,
            finish_s=record.finish_s,
            blocks=blocks,
            block_size=block_tokens,
            input_tokens=num_tokens(prompt),
            output_tokens=num_tokens(answer) if answer else None,
            output_blocks=block_ids(prompt + answer, block_tokens)[len(blocks) :],
            model=record.model or "",
            tenant=record.tenant or "",
            session_id=record.session_id,
            recording=str(file),
            trace_id=record.trace_id,
            parent_trace_id=record.parent_trace_id,
        )


def read_steps(file: Path, on_error: OnError, block_tokens: int = BLOCK_TOKENS) -> Iterator[Turn]:
    """Turns of one recorded session, sorted by time: concurrent calls are logged as they end."""
    steps = [record for record, _ in records(file, msgspec.json.Decoder(_Step), on_error)]
    steps.sort(key=lambda step: step.timestamp)
    name = _stem(file)
    for number, step in enumerate(steps):
        prompt, answer = step.input.encode(errors="surrogatepass"), step.output.encode(errors="surrogatepass")
        blocks = block_ids(prompt, block_tokens)
        yield Turn(
            request_id=f"{name}#{number}",
            arrival_s=_seconds(step.timestamp),
            finish_s=None,
            blocks=blocks,
            block_size=block_tokens,
            input_tokens=num_tokens(prompt),
            output_tokens=num_tokens(answer),
            output_blocks=block_ids(prompt + answer, block_tokens)[len(blocks) :],
            model=step.model or "",
            recording=str(file),
            trace_id=step.session_id or name,
        )


def read_trajectories(file: Path, on_error: OnError, block_tokens: int = BLOCK_TOKENS) -> Iterator[Turn]:
    """Turns of tau-bench trajectories: one for each assistant message, all starting at zero."""
    try:
        runs = msgspec.json.decode(whole(file), type=list[_Trajectory])
    except BAD_JSON as e:
        on_error(bad_line(f"{file}:1", e))
        return
    for place, run in enumerate(runs):
        name = f"{_stem(file)}.task{run.task_id}.{run.trial}.{place}"  # every file counts from task 0
        said = [i for i, message in enumerate(run.traj) if message.get("role") == "assistant"]
        for number, i in enumerate(said):
            prompt, after = render(run.traj[:i]), render(run.traj[: i + 1])
            blocks = block_ids(prompt, block_tokens)
            yield Turn(
                request_id=f"{name}#{number}",
                arrival_s=number * TAU_TURN_S,
                finish_s=None,
                blocks=blocks,
                block_size=block_tokens,
                input_tokens=num_tokens(prompt),
                output_tokens=num_tokens(after[len(prompt) :]),
                output_blocks=block_ids(after, block_tokens)[len(blocks) :],
                recording=f"{file}:{name}",
                trace_id=name,
            )


def _problem(record: _Chat, answer: bytes | None, seen: set[str]) -> str | None:
    if record.request_id in seen:
        return f"request_id {record.request_id} was there before; give every request an id of its own"
    if record.finish_s is not None and record.finish_s < record.arrival_s:
        return f"finish_s {record.finish_s} is before arrival_s {record.arrival_s}; mend one of them"
    if answer is None:
        return "output is neither text nor a message; write what the model answered"
    return None


def _answer(output: Any) -> bytes | None:
    """The recorded answer as it will stand in the next prompt; None if it is no answer."""
    if output is None:
        return b""
    if isinstance(output, str):
        return render([{"role": "assistant", "content": output}])
    if isinstance(output, dict):
        return render([{"role": "assistant", **output}])
    return None


def _stem(file: Path) -> str:
    """The file's name without its endings: what keeps the ids of several files apart."""
    return Path(file.name.removesuffix(".zst")).stem


def _seconds(stamp: float) -> float:
    """A time stamp in s, ms, us or ns since 1970, told apart by size."""
    for unit in (1e9, 1e6, 1e3):
        if stamp >= 1e8 * unit:
            return stamp / unit
    return stamp
