"""The pictures of a simulation's page."""

from collections.abc import Mapping

from impala_vllm.insight.drawing import COLOURS, GREY, figure, legend, steps, svg
from impala_vllm.sim.measures import tasks
from impala_vllm.sim.simulation import Outcome

OWN = {"stock": COLOURS[0], "impala": COLOURS[2], "unbounded": COLOURS[1]}
"""Policies that have a colour of their own before all others."""


def waits(outcomes: Mapping[str, Outcome]) -> str:
    """Mean stall of each policy as a bar, what the unluckiest tasks wait as a mark."""
    drawing, (axes,) = figure(1, 0.9 + 0.3 * len(outcomes))
    names = list(outcomes)
    colours = [OWN["impala"] if name == "impala" else COLOURS[4] for name in names]
    axes.barh(names, [outcomes[n].measures.stall_mean_s for n in names], 0.6, color=colours)
    axes.plot([outcomes[n].measures.stall_p95_s for n in names], range(len(names)), "|", color=COLOURS[5],
              markersize=12, markeredgewidth=2, label="1 task in 20 waits longer")  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds that a task waits for servers")
    legend(axes, 1)
    return svg(drawing, "waits")


def spread(outcomes: Mapping[str, Outcome]) -> str:
    """Share of tasks that were done within a time, for as many policies as there are colours."""
    drawing, (axes,) = figure(1, 2.6)
    colours = {name: colour for name, colour in OWN.items() if name in outcomes}
    others = [name for name in outcomes if name not in OWN]
    colours |= zip(others, [c for c in COLOURS if c not in colours.values()], strict=False)
    for name, colour in colours.items():
        xs, ys = steps(sorted(task.jct_s for task in tasks(outcomes[name].served)))
        axes.step(xs, ys, where="post", color=colour, label=name, linewidth=1.8)
    axes.set_xscale("log")
    axes.set_ylim(0, 102)
    axes.set_ylabel("per cent of tasks", fontsize=9)
    axes.set_xlabel("done within so many seconds")
    axes.grid(axis="y", alpha=0.15, linewidth=0.6)
    axes.yaxis.label.set_color(axes.xaxis.label.get_color())
    legend(axes, 3)
    return svg(drawing, "spread")


def tokens(outcomes: Mapping[str, Outcome]) -> str:
    """Prompt tokens of each policy: found in a tier, computed for the first time, computed again."""
    drawing, (axes,) = figure(1, 0.9 + 0.3 * len(outcomes))
    again = [float(found.measures.recomputed_tokens) for found in outcomes.values()]
    first = [found.computed_tokens - a for found, a in zip(outcomes.values(), again, strict=True)]
    cached = [float(sum(s.cached_tokens for s in found.served)) for found in outcomes.values()]
    left = [0.0] * len(outcomes)
    for label, values, colour in (
        ("found", cached, COLOURS[2]),
        ("computed, first time", first, GREY),
        ("computed again", again, COLOURS[5]),
    ):
        axes.barh(list(outcomes), values, 0.6, left=left, color=colour, label=label)
        left = [x + v for x, v in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("millions of prompt tokens")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}")
    legend(axes, 3)
    return svg(drawing, "tokens")
