"""How pictures of a report look: one SVG each, transparent, its text in the page's own colour. Needs matplotlib."""

import io
import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito: told apart by colour-blind readers, on white and on near-black.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
GREY = "#9a9a9a"
TEXT = "#123456"
"""Stands for the page's text colour until the SVG is written."""
WIDTH = 5.8
_POINTS = 200


def figure(num_panels: int, height: float) -> "tuple[Figure, list[Axes]]":
    """Panels below each other that share the x axis. `height` in inches."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(drawing)
    panels: list[Any] = list(drawing.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0])
    for axes in panels:
        axes.patch.set_alpha(0)
        axes.tick_params(colors=TEXT, labelsize=9, length=0)
        axes.xaxis.label.set_color(TEXT)
        axes.grid(axis="x", color=TEXT, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return drawing, panels


def legend(axes: "Axes", columns: int) -> None:
    """Above the panel, without a frame."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=9, labelcolor=TEXT,
        handlelength=1.0, columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip


def steps(ordered: Sequence[float]) -> tuple[list[float], list[float]]:
    """A distribution at a bounded number of points: values, and the per cent of all that are no larger.

    Times of zero are a millisecond, as axes of them are logarithmic.
    """
    if len(ordered) <= _POINTS:
        chosen = list(ordered)
    else:
        chosen = [ordered[i * (len(ordered) - 1) // (_POINTS - 1)] for i in range(_POINTS)]
    return [max(v, 1e-3) for v in chosen], [100 * bisect_right(ordered, v) / len(ordered) for v in chosen]


def svg(drawing: "Figure", name: str) -> str:
    """The picture as an element for a page; `name` tells those of one page apart."""
    import matplotlib

    out = io.StringIO()
    # Ids are salted with the name: several drawings share one page.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        drawing.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(TEXT, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'^<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", svg, count=1)
