"""The page renders from hand-made trials and needs nothing from outside."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from impala_vllm.replay.arms import ARMS, Machine
from impala_vllm.replay.linkage import Recognised, score
from impala_vllm.replay.load import Load, Run, TurnResult
from impala_vllm.replay.lowering import Scale
from impala_vllm.replay.measures import measure
from impala_vllm.replay.plan import Plan, PlannedSession, PlannedTurn
from impala_vllm.replay.report import Report, render, write
from impala_vllm.replay.trial import Trial

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture
def report() -> Report:
    turns = tuple(PlannedTurn(f"s<1>#{i}", tuple(range(40 + i)), (2,), 1.0) for i in range(2))
    plan = Plan((PlannedSession("s<1>", turns), PlannedSession("c", turns[:1], "s<1>", 0)))
    trials: list[Trial] = []
    for arm, pause in (("stock", 3.0), ("impala-observe", 3.0), ("unbounded", 1.0)):
        results = (
            TurnResult("s<1>", None, 0, "s<1>#0", "r-0", 0.0, pause / 2, pause, 0.0, 40, 1, 0, None),
            TurnResult("c", "s<1>", 0, "c#0", "r-1", pause, pause + 1, pause + 2, 0.0, 40, 1, 0, None),
            TurnResult("s<1>", None, 1, "s<1>#1", "r-2", pause + 3, pause + 4, pause + 5, 1.0, 41, 1, 32, None),
        )
        run = Run(results, pause + 5)
        links = None
        if ARMS[arm].recognises:
            links = score(
                run, {"s<1>#0": Recognised("x", None, "new"), "s<1>#1": Recognised("x", None, "continuation")}
            )
        trials.append(Trial(arm, 0, run, measure(run, computed_tokens=100, new_tokens=80), links))
    arms = tuple(ARMS[t.arm] for t in trials)
    return Report("A <test>", plan, arms, tuple(trials), Machine(Path("tiny"), dtype="float32"), Scale(), Load())


class Tags(HTMLParser):
    """Open tags that should close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_self_contained(report: Report, tmp_path: Path) -> None:
    write(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.seen.count("svg") == 3
    assert "A &lt;test&gt;" in page
    assert "s&lt;1&gt;" in page
    assert not re.search(r'(src|href)="(?!#)[^"]', re.sub(r'xmlns(:\w+)?="[^"]*"', "", page))


def test_the_page_says_what_is_at_stake_and_who_was_recognised(report: Report) -> None:
    page = render(report)
    assert "what is at stake" in page
    assert "not seen" in page
    assert "impala-observe only recognises" in page


def test_the_same_trials_give_the_same_page(report: Report) -> None:
    assert render(report) == render(report)
