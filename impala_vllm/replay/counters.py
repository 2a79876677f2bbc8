"""The engine's own counters, read from a Prometheus page before and after a run.

What clients are told in `usage` undercounts loads from lower tiers; these do not.
"""

import urllib.request
from collections.abc import Mapping


def scrape(url: str, timeout_s: float = 10.0) -> dict[str, float]:
    """Every sample of the page summed over its labels, by name."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=timeout_s) as response:
        return parse(response.read().decode())


def parse(page: str) -> dict[str, float]:
    """Sum samples by metric name; comments and malformed lines are skipped."""
    totals: dict[str, float] = {}
    for line in page.splitlines():
        if not line or line.startswith("#"):
            continue
        name = line.partition("{")[0].partition(" ")[0]
        try:
            value = float(line.rpartition("}")[2].split()[0] if "}" in line else line.split()[1])
        except (IndexError, ValueError):
            continue
        totals[name] = totals.get(name, 0.0) + value
    return totals


def observer_s(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """Seconds the engine loop spent in impala between two scrapes, by its own clock; None without impala."""
    name = "impala_observer_seconds_total"
    return after[name] - before.get(name, 0.0) if name in after else None


def tiers(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What impala counted of KV between two scrapes, its tiers included, by name; empty without impala."""
    first, last = "impala_kv_", "_total"
    return {
        name.removeprefix(first).removesuffix(last): value - before.get(name, 0.0)
        for name, value in after.items()
        if name.startswith(first) and name.endswith(last)
    }


def computed_tokens(before: Mapping[str, float], after: Mapping[str, float]) -> int | None:
    """Prompt tokens the engine computed between two scrapes; None where it does not count them."""
    asked, found = "vllm:prompt_tokens_total", "vllm:prefix_cache_hits_total"
    if asked not in after or found not in after:
        return None
    names = (asked, found, "vllm:external_prefix_cache_hits_total")  # the last one: from tiers below HBM
    grown = [after.get(name, 0.0) - before.get(name, 0.0) for name in names]
    return int(grown[0] - grown[1] - grown[2])
