"""Which recorded sessions to replay: a seeded choice out of a log, or the small log we ship."""

import random
from collections.abc import Iterable, Iterator
from importlib import resources
from itertools import groupby
from pathlib import Path

from impala_vllm import workload
from impala_vllm.workload import Turn, WorkloadError

SOURCE = "kv-cache-tester (github.com/callanjfox/kv-cache-tester, Apache-2.0)"
"""Where the bundled sessions come from, and where a stranger gets the rest."""


def bundled() -> Path:
    """The log we ship: real agent sessions, first turns only. See the note beside it."""
    return Path(str(resources.files("impala_vllm.replay") / "data" / "sessions.jsonl.zst"))


def choose(
    path: Path,
    num_sessions: int | None = None,
    *,
    min_turns: int = 1,
    max_input_tokens: int | None = None,
    seed: int = 0,
    log_format: str = "auto",
) -> list[Turn]:
    """Turns of `num_sessions` recorded sessions (None: all) with at least `min_turns` turns each.

    A session with a prompt above `max_input_tokens` among its first `min_turns` is passed over. One
    pass, holding no more than the recording at hand and the sessions asked for. Same file and seed,
    same choice, in file order. Raises WorkloadError, in one line, for a file that cannot be read or
    holds too few.
    """
    rng = random.Random(seed)
    kept: list[tuple[int, list[Turn]]] = []
    seen = 0
    for session in _sessions(workload.read(path, format=log_format)):
        own = [t.input_tokens for t in session if t.parent_trace_id is None]
        if len(own) < min_turns or (max_input_tokens is not None and max(own[:min_turns]) > max_input_tokens):
            continue
        seen += 1
        if num_sessions is None or len(kept) < num_sessions:
            kept.append((seen, session))
        elif (slot := rng.randrange(seen)) < num_sessions:
            kept[slot] = (seen, session)
    if not kept or (num_sessions is not None and len(kept) < num_sessions):
        raise WorkloadError(
            f"{path}: {len(kept)} sessions of at least {min_turns} turns that fit, {num_sessions or 1} asked for; "
            "ask for fewer or give another log"
        )
    return [turn for _, session in sorted(kept, key=lambda k: k[0]) for turn in session]


def _sessions(turns: Iterable[Turn]) -> Iterator[list[Turn]]:
    """A root trace and what hangs below it, recording by recording."""
    for _, group in groupby(turns, key=lambda t: t.recording):
        recorded = list(group)
        parents = {
            t.trace_id: t.parent_trace_id for t in recorded if t.trace_id is not None and t.parent_trace_id is not None
        }
        by_root: dict[str, list[Turn]] = {}
        for t in recorded:
            root = t.trace_id or t.request_id
            while root in parents:
                root = parents[root]
            by_root.setdefault(root, []).append(t)
        yield from by_root.values()
