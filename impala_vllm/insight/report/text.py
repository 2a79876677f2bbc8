"""The figures in words: rows for the terminal and for the page, with one spelling of numbers."""

from dataclasses import dataclass

from impala_vllm.insight.report.figures import QUANTILES, Figures, Spread
from impala_vllm.insight.report.totals import CAUSES, PHASES, SOURCES


@dataclass(frozen=True, slots=True)
class Row:
    """A figure: what it is called, what it means, how it is written."""

    name: str
    cell: str
    meaning: str = ""


MEANINGS = {
    "gap": "tools at work, the client's own time",
    "hold": "kept back by admission",
    "queue": "waiting for a place on the device",
    "load": "KV on its way from host memory or NVMe",
    "prefill": "the prompt being computed",
    "decode": "the answer being written",
    "computed": "found nowhere",
    "hbm": "found on the device",
    "host": "loaded from host memory",
    "nvme": "loaded from NVMe",
    "other": "from a connector that names no tier",
    "evicted": "sent before, and gone by the time it was needed",
    "rewritten": "the client changed what it had sent before",
    "bypassed": "the request wanted no cache",
    "preempted": "computed before the turn lost its place",
    "prompts": "for the first time",
    "outputs": "decoding them",
    "idle": "nothing to do",
}


def headline(found: Figures, price: float | None) -> list[Row]:
    """Tasks and money."""
    rows = [
        Row("tasks", f"{found.tasks:,}", f"agent runs that ended; {found.open_traces:,} go on"),
        Row("tasks an hour", number(found.tasks_per_hour), f"over {duration(found.wall_s)}"),
        Row("device hours", number(found.gpu_hours), f"{found.busy_share:.0%} of it busy"),
    ]
    if price is not None:
        money = found.money(price)
        rows.append(Row("cost", number(money["cost"]), f"at {price:g} a device hour, idle time included"))
        rows.append(Row("tasks per dollar", number(money["tasks_per_dollar"]), "in the currency of the price"))
        rows.append(Row("cost a task", number(money["cost_per_task"])))
        if money["successes_per_dollar"] is not None:
            rows.append(Row("successes per dollar", number(money["successes_per_dollar"]), "as clients reported them"))
        if money["cost_of_computing_again"] is not None:
            rows.append(Row("paid for computing again", number(money["cost_of_computing_again"]), "estimated"))
    if found.reported:
        rows.append(Row("outcome reported", f"{found.reported:,}", f"{found.succeeded:,} of them success"))
    return rows


def spreads(found: Figures) -> list[tuple[str, list[str]]]:
    """Completion time and stall: mean, quantiles, maximum. Headings: `SPREAD_HEADINGS`."""
    return [(name, _cells(s)) for name, s in (("completion", found.jct), ("stall", found.stall)) if s is not None]


SPREAD_HEADINGS = ("mean", *(f"p{q * 100:g}" for q in QUANTILES), "max")


def time(found: Figures) -> list[tuple[str, str, str, str]]:
    """A line a part: name, meaning, share of all tasks' completion time, share of the longest stalls'."""
    whole, tail = sum(found.time_s.values()), sum(found.tail_s.values())
    return [
        (name, MEANINGS[name], percent(found.time_s[name], whole), percent(found.tail_s[name], tail))
        for name in ("gap", *PHASES)
    ]


def tokens(found: Figures) -> list[Row]:
    """Prompt tokens by source, those computed again by cause, output."""
    whole = found.prompt_tokens
    rows = [Row("prompt tokens", f"{whole:,}", "of ended turns")]
    rows += [Row(f"  {n}", percent(found.tokens[n], whole), MEANINGS[n]) for n in SOURCES if found.tokens[n]]
    rows += [Row(f"  again: {n}", percent(found.again[n], whole), MEANINGS[n]) for n in CAUSES if found.again[n]]
    return [*rows, Row("output tokens", f"{found.tokens['output']:,}")]


def device(found: Figures) -> list[Row]:
    """Where paid device time went; empty where it cannot be told."""
    if found.device_s is None:
        return []
    whole = sum(found.device_s.values())
    label = {"prompts": "prompts", "outputs": "answers", "idle": "idle"}
    return [
        Row(label.get(name, f"again: {name}"), percent(value, whole), MEANINGS[name])
        for name, value in found.device_s.items()
        if value
    ]


def percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def duration(value_s: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if value_s >= 2 * size:
            return f"{value_s / size:.1f} {unit}"
    return seconds(value_s)


def _cells(spread: Spread) -> list[str]:
    return [seconds(v) for v in (spread.mean, *spread.quantiles, spread.max)]
