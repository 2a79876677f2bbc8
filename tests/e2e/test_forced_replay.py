"""A real engine emits what was recorded, whatever else is in its batch."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from impala_vllm.replay import arms, counters, tiny_model
from impala_vllm.replay.client import Client
from impala_vllm.replay.load import Load, drive
from impala_vllm.replay.plan import Plan, PlannedSession, PlannedTurn
from impala_vllm.replay.server import Server
from impala_vllm.replay.vocabulary import Vocabulary

pytestmark = pytest.mark.engine
pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model.build("1m")


@pytest.fixture(scope="module")
def words(model: Path) -> Vocabulary:
    return Vocabulary.of_model(model)


@pytest.fixture(scope="module", params=["async", "sync"])
def engine(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Both schedulers; a step too small for the prompts below, so that they are read in pieces."""
    flag = "--async-scheduling" if request.param == "async" else "--no-async-scheduling"
    machine = arms.Machine(
        model, hbm_blocks=80, max_model_len=2048, extra_args=(flag, "--max-num-batched-tokens", "256")
    )
    with arms.server(arms.ARMS["stock"], machine, tmp_path_factory.mktemp("logs")) as server:
        server.wait_ready(280)
        yield server


def complete(engine: Server, **body: Any) -> dict[str, Any]:
    data = {"model": "tiny", "temperature": 0.0, "return_token_ids": True, **body}
    request = urllib.request.Request(
        f"{engine.url}/v1/completions", json.dumps(data).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def test_the_recorded_output_is_emitted_and_ends_the_turn(engine: Server, words: Vocabulary) -> None:
    output = [*words.text("out", 9), *filter(None, [words.tool_call]), *words.text("name", 2), words.eos]
    answer = complete(
        engine, prompt=words.text("p", 700), max_tokens=len(output), vllm_xargs={"forced_output": output}
    )["choices"][0]
    assert answer["token_ids"] == output
    assert answer["finish_reason"] == "stop"


def test_an_output_without_an_end_runs_out_of_length(engine: Server, words: Vocabulary) -> None:
    output = list(words.text("long", 20))
    answer = complete(engine, prompt=words.text("p", 50), max_tokens=20, vllm_xargs={"forced_output": output})
    assert answer["choices"][0]["token_ids"] == output
    assert answer["choices"][0]["finish_reason"] == "length"


def test_requests_without_a_recording_are_untouched_beside_forced_ones(engine: Server, words: Vocabulary) -> None:
    plain: dict[str, Any] = {"prompt": words.text("q", 60), "max_tokens": 12, "ignore_eos": True}
    alone = complete(engine, **plain)["choices"][0]["token_ids"]

    async def together() -> list[dict[str, Any]]:
        forced = [list(words.text(f"f{i}", 5 + i)) for i in range(6)]
        calls = [
            asyncio.to_thread(
                complete, engine, prompt=words.text(f"p{i}", 300), max_tokens=len(f), vllm_xargs={"forced_output": f}
            )
            for i, f in enumerate(forced)
        ]
        answers = await asyncio.gather(*calls, asyncio.to_thread(complete, engine, **plain))
        for answer, f in zip(answers, forced, strict=False):
            assert answer["choices"][0]["token_ids"] == f
        return answers

    answers = asyncio.run(together())
    assert answers[-1]["choices"][0]["token_ids"] == alone


@pytest.mark.parametrize(
    ("xargs", "says"),
    [({"forced_output": [5]}, "has 1 tokens"), ({"forced_output": "no"}, "must be a list of token ids")],
)
def test_a_recording_that_cannot_be_forced_is_refused(
    engine: Server, words: Vocabulary, xargs: dict[str, Any], says: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        complete(engine, prompt=words.text("p", 9), max_tokens=4, vllm_xargs=xargs)
    assert caught.value.code == 400
    assert says in caught.value.read().decode()


def test_forced_outputs_are_found_again_by_the_next_turn_under_preemption(engine: Server, words: Vocabulary) -> None:
    sessions: list[PlannedSession] = []
    for s in range(6):
        context = words.text(f"s{s}", 400)
        turns: list[PlannedTurn] = []
        for t in range(3):
            turns.append(PlannedTurn(f"s{s}#{t}", context, (*words.text(f"o{s}{t}", 60), words.eos), 0.0))
            context += turns[-1].output + words.text(f"n{s}{t}", 40)
        sessions.append(PlannedSession(f"s{s}", tuple(turns)))
    plan = Plan(tuple(sessions))
    before = counters.scrape(engine.url)

    async def replay() -> None:
        async with Client(engine.url, "tiny", salt="test") as client:
            run = await drive(plan, client, Load(spread_s=0.0))
        assert [r.error for r in run.results] == [None] * 18
        planned = {t.request_id: len(t.output) for _, _, t in plan.turns()}
        assert all(r.output_tokens == planned[r.recorded_id] for r in run.results)

    asyncio.run(replay())
    computed = counters.computed_tokens(before, counters.scrape(engine.url))
    assert computed is not None
    assert computed >= plan.new_tokens(32)
