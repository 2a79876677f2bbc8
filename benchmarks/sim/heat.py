"""The study as one page: a heat map of stall a workload, policies down, points across. Needs nothing but a browser."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.sim.verdict import over
from impala_vllm.sim.measures import Measures

MOST = 8.0
"""Ratios beyond it have the last colour."""


def page(
    found: Mapping[Any, Mapping[str, Sequence[Measures]]], timing: str, names: Mapping[Any, str] | None = None
) -> str:
    """`found`: measures by point and policy; a point has `workload` and says in words, or in `names`, what it is."""
    workloads = list(dict.fromkeys(point.workload for point in found))
    parts = [
        "<!doctype html><meta charset=utf-8><title>Policies in virtual time</title>",
        "<style>body{font:15px system-ui;margin:2em;max-width:80em}img{max-width:100%}</style>",
        f"<h1>Policies in virtual time</h1><p>Simulated, not measured. Timing: {html.escape(timing)}. Mean stall over "
        "impala's at the same point: above 1 impala stalls less. Bounds know or have what no server can.</p>",
    ]
    for workload in workloads:
        points = {p: by_policy for p, by_policy in found.items() if p.workload == workload}
        image = _map(points, names or {})
        parts.append(f"<h2>{html.escape(workload)}</h2><img alt='' src='data:image/png;base64,{image}'>")
    return "".join(parts)


def _map(points: Mapping[Any, Mapping[str, Sequence[Measures]]], names: Mapping[Any, str]) -> str:
    policies = [n for n in next(iter(points.values())) if n != "impala"]
    ratios = [[over(by_policy[n], by_policy["impala"]) for by_policy in points.values()] for n in policies]
    figure = Figure(figsize=(2.5 + 0.75 * len(points), 2.2 + 0.35 * len(policies)), layout="constrained")
    axes = figure.subplots()
    colours = [[math.log(min(MOST, max(1 / MOST, r))) for r in row] for row in ratios]
    axes.imshow(colours, cmap="RdYlGn", vmin=-math.log(MOST), vmax=math.log(MOST), aspect="auto")
    labels = [names.get(p, str(p)).partition(" ")[2] for p in points]
    axes.set_xticks(range(len(points)), labels, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(policies)), policies, fontsize=8)
    for y, row in enumerate(ratios):
        for x, ratio in enumerate(row):
            axes.text(x, y, f"{ratio:.2f}", ha="center", va="center", fontsize=7)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return base64.b64encode(out.getvalue()).decode("ascii")
