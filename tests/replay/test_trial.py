"""Trials against a small server that stands in for vLLM, scrape and links included."""

import sys
from pathlib import Path
from typing import Any

import pytest

from impala_vllm.replay import trial
from impala_vllm.replay.arms import Arm, Machine
from impala_vllm.replay.load import Load, TurnResult
from impala_vllm.replay.plan import Plan, PlannedSession, PlannedTurn
from impala_vllm.replay.server import Server, ServerError
from impala_vllm.replay.trial import Trial, run_trials

pytest.importorskip("aiohttp")

ENGINE = """
import sys
from aiohttp import web
seen, links = [0], []
async def health(_): return web.Response()
PAGE = "vllm:prompt_tokens_total %d\\nvllm:prefix_cache_hits_total 0\\n"
async def metrics(_): return web.Response(text=PAGE % seen[0])
async def complete(request):
    asked = await request.json()
    seen[0] += len(asked["prompt"])
    if asked["prompt"][0] == 13: sys.exit(3)
    links.append({"request_id": f"cmpl-{request.headers['X-Request-Id']}-0", "trace_id": f"t{asked['prompt'][0]}",
                  "parent_trace_id": None, "source": "new"})
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b'data: {"choices": [{"text": "x"}]}\\n\\ndata: {"choices": [], "usage": '
                         b'{"prompt_tokens": %d, "completion_tokens": 1}}\\n\\n' % len(asked["prompt"]))
    return response
async def rows(request):
    found = links if request.path.endswith("links") else [{"trace_id": "t1", "turns": 2}]
    after = int(request.query.get("after", 0))
    more = after + 2 < len(found)
    return web.json_response({"ranks": [{"rows": found[after:after + 2], "next": str(after + 2) if more else None}]})
app = web.Application()
app.add_routes([web.get("/health", health), web.get("/metrics", metrics), web.post("/v1/completions", complete),
                web.get("/impala/{what}", rows)])
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
"""


class Silent:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, int]] = []

    def starting(self, arm: str, waited_s: float) -> None: ...
    def running(self, arm: str, repetition: int, num_turns: int) -> None:
        self.ran.append((arm, repetition))

    def turn(self, result: TurnResult) -> None: ...
    def ended(self, trial: Trial) -> None: ...


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Server]:
    """Servers that were started, with the stand-in in place of vLLM."""
    made: list[Server] = []

    def fake(arm: Arm, machine: Machine, log_dir: Path) -> Server:
        made.append(Server(arm.name, [sys.executable, "-c", ENGINE, "{port}"], log_dir / f"{arm.name}.log"))
        return made[-1]

    monkeypatch.setattr(trial, "server", fake)
    return made


def plan(first: int = 1) -> Plan:
    turns = tuple(PlannedTurn(f"a#{i}", (first, *range(i + 40)), (2,), 0.0) for i in range(3))
    return Plan((PlannedSession("a", turns),))


def run(planned: Plan, order: list[str], tmp_path: Path, watcher: Silent, **options: Any) -> list[Trial]:
    arms = (Arm("plain", ""), Arm("knowing", "", recognises=True))
    machine = Machine(tmp_path, dtype="float32")
    return run_trials(planned, arms, order, machine, Load(), tmp_path, watcher, **options)


def test_arms_take_turns_and_are_measured_and_scored(started: list[Server], tmp_path: Path) -> None:
    watcher = Silent()
    trials = run(plan(), ["plain", "knowing", "knowing", "plain"], tmp_path, watcher)
    assert watcher.ran == [("plain", 0), ("knowing", 0), ("knowing", 1), ("plain", 1)]
    assert [t.measures.computed_tokens for t in trials] == [126] * 4
    assert [t.links.f1 if t.links else None for t in trials] == [None, 1.0, 1.0, None]
    assert len(started) == 2
    assert not any(s.alive() for s in started)


def test_fresh_engines_are_started_for_every_run_one_at_a_time(started: list[Server], tmp_path: Path) -> None:
    run(plan(), ["plain", "knowing", "plain"], tmp_path, Silent(), fresh_engines=True)
    assert len(started) == 3
    assert not any(s.alive() for s in started)


def test_arms_of_one_engine_take_turns_on_it_and_mark_their_salts(
    started: list[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    salts: list[str] = []

    class Salted(trial.Client):
        def __init__(self, url: str, model: str, *, salt: str, **options: Any) -> None:
            salts.append(salt)
            super().__init__(url, model, salt=salt, **options)

    monkeypatch.setattr(trial, "Client", Salted)
    arms = (Arm("one", "", engine="both", salt_mark="-stock"), Arm("other", "", engine="both"))
    machine = Machine(tmp_path, dtype="float32")
    trials = run_trials(plan(), arms, ["one", "other", "other", "one"], machine, Load(), tmp_path, Silent())
    assert [(t.arm, t.repetition) for t in trials] == [("one", 0), ("other", 0), ("other", 1), ("one", 1)]
    assert salts == ["warm-up", "run0-stock", "run1", "run2", "run3-stock"]
    assert len(started) == 1


def test_an_engine_that_dies_ends_the_trials_in_one_line(started: list[Server], tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="plain: ") as caught:
        run(plan(first=13), ["plain", "knowing"], tmp_path, Silent())
    assert "\n" not in str(caught.value)
    assert not any(s.alive() for s in started)


def test_what_has_been_measured_outlives_an_interruption(started: list[Server], tmp_path: Path) -> None:
    class Impatient(Silent):
        def running(self, arm: str, repetition: int, num_turns: int) -> None:
            if repetition == 1:
                raise KeyboardInterrupt

    done: list[Trial] = []
    with pytest.raises(KeyboardInterrupt):
        run(plan(), ["plain", "knowing", "knowing", "plain"], tmp_path, Impatient(), done=done)
    assert [(t.arm, t.repetition) for t in done] == [("plain", 0), ("knowing", 0)]
    assert not any(s.alive() for s in started)
