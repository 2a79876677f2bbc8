"""A live server in figures: what `impala top` shows, out of /impala/health, /impala/traces and /metrics.

Pure: texts in, a view out. Rates need the view before. What a server does not tell is None.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]
"""Value by name and labels."""

STATES = ("running", "gap", "ended")
GIB = 1 << 30

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Tier:
    """Room for KV, and what of it is filled."""

    name: str
    share: float
    """Filled, 0 to 1."""
    size_gib: float | None = None
    """None: the server tells the share only."""


@dataclass(frozen=True, slots=True)
class View:
    """A moment of a server, all ranks together."""

    at_s: float
    status: str
    reasons: tuple[str, ...]
    mode: str
    traces: dict[str, int]
    """By state."""
    trace_rows: tuple[dict[str, Any], ...]
    """Running traces, then those in a gap; each the longest first."""
    working_set_tokens: int
    """Last context of the traces shown to us that have not ended."""
    tiers: tuple[Tier, ...]
    running: int
    waiting: int
    held: int | None
    longest_wait_s: float | None
    counters: dict[str, float]
    """Prompt tokens by source, output tokens, steps, device counters: what rates are made of."""
    trouble: tuple[str, ...]
    """Parts that do less than their work, with a number."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Between two views, or since the server's start."""

    over_s: float | None
    """None: since the start."""
    prompt_tokens: float
    hit_ratio: float | None
    """None: no prompt token came."""
    output_tokens: float
    by_source: dict[str, float]
    """Shares of prompt tokens."""


def view(at_s: float, health: Mapping[str, Any], pages: Sequence[Mapping[str, Any]], metrics: str) -> View:
    """`pages`: answers of /impala/traces for running traces and for those in a gap."""
    samples = parse(metrics)
    rows = [row for page in pages for rank in page["ranks"] for row in rank["rows"]]
    unique = {(row["trace_id"], row.get("tenant"), row["age_s"]): row for row in rows}
    rows = sorted(unique.values(), key=lambda r: (r["state"] != "running", -r["tokens"]))
    return View(
        at_s=at_s,
        status=str(health["status"]),
        reasons=tuple(health["reasons"]),
        mode=str(health["mode"]),
        traces={state: int(total(samples, "impala_traces", state=state)) for state in STATES},
        trace_rows=tuple(rows),
        working_set_tokens=sum(row["tokens"] for row in rows if row["state"] != "ended"),
        tiers=tuple(_tiers(samples)),
        running=sum(rank["running"] for rank in health["ranks"]),
        waiting=sum(rank["waiting"] for rank in health["ranks"]),
        held=_maybe(samples, "impala_held_turns"),
        longest_wait_s=_largest(samples, "impala_longest_wait_seconds"),
        counters={
            **{s: total(samples, "vllm:prompt_tokens_by_source_total", source=s) for s in SOURCES},
            "output": total(samples, "vllm:generation_tokens_total"),
        },
        trouble=tuple(_trouble(samples)),
    )


SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
"""vLLM's names."""


def rates(now: View, before: View | None) -> Rates:
    """From `before` on; since the start without it. A server that began anew counts from its start."""
    if before is not None and any(now.counters[name] < value for name, value in before.counters.items()):
        before = None
    grown = {name: value - (before.counters[name] if before else 0.0) for name, value in now.counters.items()}
    prompt = sum(grown[name] for name in SOURCES)
    over_s = now.at_s - before.at_s if before is not None else None
    scale = 1.0 / over_s if over_s else 1.0
    return Rates(
        over_s,
        prompt * scale,
        1 - grown["local_compute"] / prompt if prompt else None,
        grown["output"] * scale,
        {name: grown[name] / prompt if prompt else 0.0 for name in SOURCES},
    )


def parse(page: str) -> Samples:
    """Samples of a Prometheus page. Lines that are none are skipped."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for line in page.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        found[match[1], tuple(_LABEL.findall(match[2] or ""))] = value
    return found


def total(samples: Samples, name: str, **labels: str) -> float:
    """Sum over all samples of a name that carry these labels; 0 without one."""
    wanted = set(labels.items())
    return sum(v for (n, found), v in samples.items() if n == name and wanted <= set(found))


def _maybe(samples: Samples, name: str) -> int | None:
    return int(total(samples, name)) if any(n == name for n, _ in samples) else None


def _largest(samples: Samples, name: str) -> float | None:
    return max((v for (n, _), v in samples.items() if n == name), default=None)


def _tiers(samples: Samples) -> list[Tier]:
    found: list[Tier] = []
    used = [v for (n, _), v in samples.items() if n == "vllm:kv_cache_usage_perc"]
    if used:
        found.append(Tier("HBM", sum(used) / len(used)))
    for name, key in (("host", "host"), ("NVMe", "nvme")):
        size = total(samples, f"impala_kv_{key}_size_bytes")
        if size:
            found.append(Tier(name, total(samples, f"impala_kv_{key}_used_bytes") / size, size / GIB))
    return found


_OFF = (
    ("impala_identity_on", "identity is off: nothing is recognised"),
    ("impala_policy_on", "policy is off: vLLM's own order"),
    ("impala_kv_nvme_usable", "the NVMe tier is left alone after errors"),
)
_COUNTED = (
    ("impala_kv_nvme_errors_total", "NVMe errors"),
    ("impala_kv_nvme_checksum_failures_total", "NVMe checksum failures"),
    ("impala_ledger_dropped_records_total", "ledger records lost"),
    ("impala_requests_unlinked_total", "requests without a trace"),
)


def _trouble(samples: Samples) -> list[str]:
    found = [text for name, text in _OFF if any(n == name and v == 0 for (n, _), v in samples.items())]
    return found + [f"{text}: {count:,.0f}" for name, text in _COUNTED if (count := total(samples, name))]
