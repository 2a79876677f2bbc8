"""The pictures of a report: one SVG each, transparent, its text in the page's own colour."""

from collections.abc import Mapping, Sequence

from impala_vllm.insight.drawing import COLOURS, GREY, TEXT, figure, legend, svg
from impala_vllm.replay.measures import tasks
from impala_vllm.replay.trial import Trial


def completion(trials: Sequence[Trial], names: Mapping[str, str]) -> str:
    """A bar a session and arm: time in tools, then time the server kept it waiting."""
    per_arm = {t.arm: {task.session_id: task for task in tasks(t.run)} for t in trials}
    sessions = list(next(iter(per_arm.values())))
    height = 0.8 / len(per_arm)
    drawing, axes = figure(1, 0.9 + len(sessions) * (0.16 + 0.16 * len(per_arm)))
    for a, (arm, by_session) in enumerate(per_arm.items()):
        rows = [i + (a - (len(per_arm) - 1) / 2) * height for i in range(len(sessions))]
        found = [by_session[s] for s in sessions]
        axes[0].barh(rows, [t.gaps_s for t in found], height * 0.9, color=GREY, alpha=0.55,
                     label="tools at work" if a == 0 else None)  # fmt: skip
        axes[0].barh(rows, [t.stall_s for t in found], height * 0.9, left=[t.gaps_s for t in found],
                     color=COLOURS[a % len(COLOURS)], label=arm)  # fmt: skip
    axes[0].set_yticks(range(len(sessions)), [names[s] for s in sessions])
    axes[0].invert_yaxis()
    axes[0].set_xlabel("seconds from a session's first request to its last answer")
    legend(axes[0], 1 + len(per_arm))
    return svg(drawing, "completion")


def timeline(trials: Sequence[Trial], names: Mapping[str, str]) -> str:
    """A panel an arm, a row a session, a bar a request: until its first token, then until its end."""
    rows = {s: i for i, s in enumerate(names)}
    drawing, panels = figure(len(trials), len(trials) * (0.75 + 0.19 * len(rows)))
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
        axes.set_title(trial.arm, loc="left", fontsize=10, color=TEXT)
        axes.set_xlim(0, max(t.run.makespan_s for t in trials) * 1.02)
    panels[-1].set_xlabel("seconds since the start")
    return svg(drawing, "timeline")


def work(trials: Sequence[Trial]) -> str:
    """Prompt tokens by arm: found in the cache, computed for the first time, computed again."""
    arms = [t.arm for t in trials]
    drawing, (axes,) = figure(1, 1.0 + 0.42 * len(arms))
    again = [float(t.measures.recomputed_tokens or 0) for t in trials]
    first = [float((t.measures.computed_tokens or 0) - (t.measures.recomputed_tokens or 0)) for t in trials]
    cached = [t.measures.prompt_tokens - f - a for t, f, a in zip(trials, first, again, strict=True)]
    left = [0.0] * len(arms)
    for label, values, colour in (
        ("from the cache", cached, COLOURS[2]),
        ("computed, first time", first, GREY),
        ("computed again", again, COLOURS[5]),
    ):
        axes.barh(arms, values, 0.6, left=left, color=colour, label=label)
        left = [x + v for x, v in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("prompt tokens")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
    legend(axes, 3)
    return svg(drawing, "work")
