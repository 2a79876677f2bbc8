"""The pictures of a report: one SVG each, transparent, its text in the page's own colour."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from impala_vllm.replay.measures import tasks
from impala_vllm.replay.trial import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito: told apart by colour-blind readers, on white and on near-black.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_TOOL = "#9a9a9a"
_TEXT = "#123456"
"""Stands for the page's text colour until the SVG is written."""
_WIDTH = 5.8


def completion(trials: Sequence[Trial], names: Mapping[str, str]) -> str:
    """A bar a session and arm: time in tools, then time the server kept it waiting."""
    per_arm = {t.arm: {task.session_id: task for task in tasks(t.run)} for t in trials}
    sessions = list(next(iter(per_arm.values())))
    height = 0.8 / len(per_arm)
    figure, axes = _figure(1, 0.9 + len(sessions) * (0.16 + 0.16 * len(per_arm)))
    for a, (arm, by_session) in enumerate(per_arm.items()):
        rows = [i + (a - (len(per_arm) - 1) / 2) * height for i in range(len(sessions))]
        found = [by_session[s] for s in sessions]
        axes[0].barh(rows, [t.gaps_s for t in found], height * 0.9, color=_TOOL, alpha=0.55,
                     label="tools at work" if a == 0 else None)  # fmt: skip
        axes[0].barh(rows, [t.stall_s for t in found], height * 0.9, left=[t.gaps_s for t in found],
                     color=COLOURS[a % len(COLOURS)], label=arm)  # fmt: skip
    axes[0].set_yticks(range(len(sessions)), [names[s] for s in sessions])
    axes[0].invert_yaxis()
    axes[0].set_xlabel("seconds from a session's first request to its last answer")
    _legend(axes[0], 1 + len(per_arm))
    return _svg(figure, "completion")


def timeline(trials: Sequence[Trial], names: Mapping[str, str]) -> str:
    """A panel an arm, a row a session, a bar a request: until its first token, then until its end."""
    rows = {s: i for i, s in enumerate(names)}
    figure, panels = _figure(len(trials), len(trials) * (0.75 + 0.19 * len(rows)))
    for a, (trial, axes) in enumerate(zip(trials, panels, strict=True)):
        colour = COLOURS[a % len(COLOURS)]
        for r in trial.run.results:
            if r.session_id not in rows:
                continue
            first = r.end_s if r.first_token_s is None else r.first_token_s
            row = rows[r.session_id]
            axes.barh(row, first - r.start_s, 0.72, left=r.start_s, color=colour, linewidth=0)
            axes.barh(row, max(r.end_s - first, 0.0), 0.72, left=first, color=colour, alpha=0.4, linewidth=0)
        axes.set_yticks(range(len(rows)), [names[s] for s in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_title(trial.arm, loc="left", fontsize=10, color=_TEXT)
        axes.set_xlim(0, max(t.run.makespan_s for t in trials) * 1.02)
    panels[-1].set_xlabel("seconds since the start")
    return _svg(figure, "timeline")


def work(trials: Sequence[Trial]) -> str:
    """Prompt tokens by arm: found in the cache, computed for the first time, computed again."""
    arms = [t.arm for t in trials]
    figure, (axes,) = _figure(1, 1.0 + 0.42 * len(arms))
    again = [float(t.measures.recomputed_tokens or 0) for t in trials]
    first = [float((t.measures.computed_tokens or 0) - (t.measures.recomputed_tokens or 0)) for t in trials]
    cached = [t.measures.prompt_tokens - f - a for t, f, a in zip(trials, first, again, strict=True)]
    left = [0.0] * len(arms)
    for label, values, colour in (
        ("from the cache", cached, COLOURS[2]),
        ("computed, first time", first, _TOOL),
        ("computed again", again, COLOURS[5]),
    ):
        axes.barh(arms, values, 0.6, left=left, color=colour, label=label)
        left = [x + v for x, v in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("prompt tokens")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
    _legend(axes, 3)
    return _svg(figure, "work")


def _figure(num_panels: int, height: float) -> "tuple[Figure, list[Axes]]":
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    panels: list[Any] = list(figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0])
    for axes in panels:
        axes.patch.set_alpha(0)
        axes.tick_params(colors=_TEXT, labelsize=9, length=0)
        axes.xaxis.label.set_color(_TEXT)
        axes.grid(axis="x", color=_TEXT, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure, panels


def _legend(axes: "Axes", columns: int) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=9, labelcolor=_TEXT,
        handlelength=1.0, columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip


def _svg(figure: "Figure", name: str) -> str:
    import matplotlib

    out = io.StringIO()
    # Ids are salted with the name: several drawings share one page.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_TEXT, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'^<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", svg, count=1)
