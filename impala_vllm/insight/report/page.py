"""One self-contained HTML page about a ledger: for a screen, a phone and paper. Needs jinja2 and matplotlib."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from impala_vllm import __version__
from impala_vllm.insight import templates
from impala_vllm.insight.ledger.read import Reading
from impala_vllm.insight.report import text
from impala_vllm.insight.report.advice import Advice
from impala_vllm.insight.report.figures import Figures


@dataclass(frozen=True, slots=True)
class Simulated:
    """The counterfactual as the page shows it; without rows, `answer` says why there is none."""

    answer: str
    headings: tuple[str, ...] = ()
    rows: tuple[tuple[str, tuple[str, ...]], ...] = ()
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """What the page is about."""

    title: str
    figures: Figures
    advice: list[Advice]
    reading: Reading
    simulated: Simulated
    price: float | None = None
    servers: list[str] = field(default_factory=list[str])
    """A line each."""

    def render(self) -> str:
        """The page as text."""
        from impala_vllm.insight.report import plots

        found = self.figures
        has_tasks = found.tasks > 0
        context: dict[str, Any] = {
            "page": self,
            "found": found,
            "version": __version__,
            "start": _when(found.start),
            "end": _when(found.end),
            "headline": text.headline(found, self.price),
            "spreads": text.spreads(found),
            "spread_headings": text.SPREAD_HEADINGS,
            "time": text.time(found),
            "tokens": text.tokens(found),
            "device": text.device(found),
            "seconds": text.seconds,
            "time_plot": plots.time(found) if has_tasks else None,
            "spread_plot": plots.spread(found) if has_tasks else None,
            "timeline_plot": plots.timeline(found) if has_tasks else None,
            "tokens_plot": plots.tokens(found) if found.prompt_tokens else None,
        }
        return templates.render("impala_vllm.insight.report", context)


def _when(unix_s: float) -> str:
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M} UTC"
