"""The pictures of a ledger's report."""

from collections.abc import Mapping
from datetime import UTC, datetime

from impala_vllm.insight.drawing import COLOURS, GREY, figure, legend, steps, svg
from impala_vllm.insight.report.figures import Figures

PART_COLOURS = {
    "gap": GREY,
    "hold": COLOURS[4],
    "queue": COLOURS[1],
    "load": COLOURS[3],
    "prefill": COLOURS[5],
    "decode": COLOURS[0],
}
SOURCE_COLOURS = {
    "computed": COLOURS[5],
    "hbm": COLOURS[2],
    "host": COLOURS[4],
    "nvme": COLOURS[0],
    "other": GREY,
}


def time(found: Figures) -> str:
    """Two bars: completion time of all tasks by what it was spent on, and that of those that stalled longest."""
    drawing, (axes,) = figure(1, 1.9)
    rows = [("all tasks", found.time_s), ("longest stalls", found.tail_s)]
    left = [0.0] * len(rows)
    for part, colour in PART_COLOURS.items():
        shares = [_share(spent, part) for _, spent in rows]
        if any(shares):
            alpha, label = (0.55, "tools") if part == "gap" else (1.0, part)
            axes.barh([name for name, _ in rows], shares, 0.6, left=left, color=colour, label=label, alpha=alpha)
            left = [x + share for x, share in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("per cent of completion time")
    if any(left):
        legend(axes, 6)
    return svg(drawing, "time")


def spread(found: Figures) -> str:
    """Share of tasks that took at most so long, and that waited at most so long."""
    drawing, (axes,) = figure(1, 2.6)
    for name, values, colour in (
        ("completion", found.jct_values, COLOURS[0]),
        ("stall", found.stall_values, COLOURS[5]),
    ):
        xs, ys = steps(values)
        axes.plot(xs, ys, color=colour, label=name, linewidth=1.8)
    if found.jct_values and found.jct_values[-1] > 0:
        axes.set_xscale("log")
    axes.set_ylim(0, 102)
    axes.set_ylabel("per cent of tasks", fontsize=9)
    axes.set_xlabel("within so many seconds")
    axes.grid(axis="y", alpha=0.15, linewidth=0.6)
    axes.yaxis.label.set_color(axes.xaxis.label.get_color())
    legend(axes, 2)
    return svg(drawing, "spread")


def tokens(found: Figures) -> str:
    """Prompt tokens by where their KV came from."""
    drawing, (axes,) = figure(1, 1.3)
    left = 0.0
    for source, colour in SOURCE_COLOURS.items():
        share = 100 * found.tokens[source] / max(1, found.prompt_tokens)
        if share:
            axes.barh(["prompt tokens"], [share], 0.6, left=[left], color=colour, label=source)
            left += share
    axes.set_xlim(0, 100)
    axes.set_xlabel("per cent")
    legend(axes, 5)
    return svg(drawing, "tokens")


def timeline(found: Figures) -> str:
    """Tasks that ended, and the mean stall of those, along the time of the ledger."""
    drawing, (above, below) = figure(2, 3.0)
    buckets = found.timeline
    width_s = buckets[1].start - buckets[0].start
    hours = [(b.start - buckets[0].start + width_s / 2) / 3600 for b in buckets]
    unit, scale = ("hours", 1.0) if hours[-1] > 2 else ("minutes", 60.0)
    xs = [h * scale for h in hours]
    above.bar(xs, [b.tasks / width_s * 3600 for b in buckets], width_s / 3600 * scale * 0.9, color=COLOURS[2])
    above.set_title("tasks an hour", loc="left", fontsize=9, color=above.xaxis.label.get_color())
    known = [(x, b.stall_mean_s) for x, b in zip(xs, buckets, strict=True) if b.stall_mean_s is not None]
    below.plot([x for x, _ in known], [s for _, s in known], color=COLOURS[5], linewidth=1.6, marker=".", markersize=4)
    below.set_ylim(bottom=0)
    below.set_title("mean stall of a task, seconds", loc="left", fontsize=9, color=below.xaxis.label.get_color())
    below.set_xlabel(f"{unit} since {datetime.fromtimestamp(buckets[0].start, UTC):%Y-%m-%d %H:%M} UTC")
    for axes in (above, below):
        axes.grid(axis="y", alpha=0.15, linewidth=0.6)
    return svg(drawing, "timeline")


def _share(spent: Mapping[str, float], part: str) -> float:
    total = sum(spent.values())
    return 100 * spent[part] / total if total else 0.0
