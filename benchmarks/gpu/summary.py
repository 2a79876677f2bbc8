"""What a finished run says in a few lines: bandwidth against the link and vLLM's swap, arms against stock."""

from pathlib import Path

from benchmarks import record
from benchmarks.record import Record, RecordError

COMPARED = ("tasks_per_hour", "stall_mean_s", "jct_mean_s", "resume_ttft_p50_s")
BARS = ("share of link", "to vLLM's", "slow-down")


def lines(directory: Path) -> list[str]:
    """Of the records in a folder, the newest of each figure. Never raises for what is in it."""
    try:
        records = record.read(sorted(directory.glob("*.jsonl")))
    except RecordError as e:
        return [f"summary: {e}"]
    newest = {(r.question, r.variant, r.metric): r for r in records}
    return [*_bars(newest), *_arms(newest)]


def _bars(newest: dict[tuple[str, str, str], Record]) -> list[str]:
    found: dict[tuple[str, str], list[float]] = {}
    for (question, variant, metric), r in newest.items():
        for bar in BARS:
            if metric.startswith(bar):
                found.setdefault((f"{question}, {metric}", variant), []).append(r.p50)
    return [
        f"summary: {what}, {variant}: {min(values):.3f} to {max(values):.3f}"
        for (what, variant), values in sorted(found.items())
    ]


def _arms(newest: dict[tuple[str, str, str], Record]) -> list[str]:
    said: list[str] = []
    for (question, variant, metric), r in newest.items():
        stock = newest.get((question, "stock", metric))
        if variant == "stock" or stock is None or metric not in COMPARED or not stock.p50:
            continue
        said.append(f"summary: {question}, {metric}: {variant} / stock = {r.p50 / stock.p50:.3f}")
    return said
