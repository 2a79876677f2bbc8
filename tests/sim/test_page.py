"""The page answers the question it was asked, needs nothing from outside, and trusts no name in a log."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from impala_vllm.sim import page
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.question import Asked, ask
from impala_vllm.sim.simulation import run
from tests.sim.scenes import TIMING
from tests.sim.test_question import log

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def found():
    question = ask(log(), Asked(TIMING, num_replicas=2, hbm_tokens=100, load=2.0))
    names = ("unbounded", "stock", "continuum", "impala")
    return question, {name: run(question.workload, question.setup, KINDS[name]) for name in names}


class Tags(HTMLParser):
    """Open tags that should close, and what is drawn and written."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.num_drawings = 0
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.num_drawings += tag == "svg"
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.words.append(data)


def read(text: str) -> tuple[Tags, str]:
    tags = Tags()
    tags.feed(text)
    return tags, " ".join(" ".join(tags.words).split())


def test_the_page_is_whole_escaped_and_self_contained(found):
    text = page.render("a<b>.jsonl", found[0], 0, found[1], {})
    tags, _ = read(text)
    assert tags.open == []
    assert tags.num_drawings == 3
    assert "a&lt;b&gt;.jsonl" in text
    assert "<b>.jsonl" not in text
    assert not re.search(r'(src|href)="(?!#)[^"]', re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))


def test_the_question_is_answered_in_words_with_its_assumptions(found):
    question, outcomes = found
    _, words = read(page.render("log.jsonl", question, 7, outcomes, {"impala": 1, "continuum": None}))
    assert "What would impala save on 2 replicas with log.jsonl?" in words
    assert "Simulated, not measured." in words
    assert "With stock vLLM a task waits" in words
    assert "2 replicas finish" in words
    assert "Of the other policies tasks wait least under" in words
    assert all(" ".join(line.split()) in words for line in question.assumptions)
    assert "seed 7" in words
    assert "On 1 replica impala lets tasks wait no longer than stock on 2 replicas" in words
    assert "continuum does not do as well as stock on 2 replicas." in words


def test_figures_stand_out_only_where_stock_and_impala_were_run(found):
    question, outcomes = found
    assert len(page.tiles(outcomes)) == 4
    alone = {"impala": outcomes["impala"]}
    assert page.tiles(alone) == []
    _, words = read(page.render("log.jsonl", question, 0, alone, {}))
    assert "What would it cost on 2 replicas with log.jsonl?" in words
    assert "stock" not in " ".join(page.answer(question, alone, {}))


def test_bounds_come_last_and_are_called_so(found):
    made = page.rows(found[1])
    assert [row.name for row in made] == ["stock", "continuum", "impala", "unbounded"]
    assert [row.is_bound for row in made] == [False, False, False, True]


def test_a_log_without_names_says_what_was_recognised(found):
    turns = [replace(t, trace_id=None) for t in sorted(log(2), key=lambda t: t.arrival_s)]
    question = ask(turns, Asked(TIMING, hbm_tokens=100))
    outcome = run(question.workload, question.setup, KINDS["stock"])
    _, words = read(page.render("log.jsonl", question, 0, {"stock": outcome}, {}))
    assert "names no session of 4 of its requests; the code that runs in the engine took them for 2 sessions" in words
