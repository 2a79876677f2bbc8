"""vLLM's scheduler in virtual time: time jumps, everything is served, the same call gives the same figures."""

import asyncio
import dataclasses

import pytest

pytest.importorskip("vllm")

from click.testing import CliRunner

from benchmarks.virtual import clock, sustained
from benchmarks.virtual.__main__ import main
from benchmarks.virtual.bench import Bench, settings
from benchmarks.virtual.engine import TIMINGS
from benchmarks.virtual.sustained import Search
from impala_vllm.plugin import register
from impala_vllm.replay import synthetic, tiny_model
from impala_vllm.replay.arms import ARMS
from impala_vllm.replay.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def bench():
    register()
    model = tiny_model.build("1m")
    return Bench(model, Vocabulary.of_model(model), TIMINGS["cpu-26m"], 128)


def test_a_day_of_timers_passes_at_once_and_in_order():
    async def day() -> tuple[list[str], float]:
        seen: list[str] = []

        async def after(delay_s: float, name: str) -> None:
            await asyncio.sleep(delay_s)
            seen.append(name)

        await asyncio.gather(after(86_400.0, "late"), after(60.0, "early"))
        return seen, asyncio.get_running_loop().time()

    assert clock.run(day()) == (["early", "late"], pytest.approx(86_400.0))


def test_a_wait_that_no_timer_ends_is_an_error():
    with pytest.raises(RuntimeError, match="no timer brings"):
        clock.run(asyncio.Event().wait())


@pytest.mark.parametrize("arm", ["stock", "impala-enforce"])
def test_with_room_for_all_nothing_is_computed_twice(bench, arm):
    plan = synthetic.fan_out(bench.vocabulary, num_parents=2, num_forks=3)
    found = bench.replay(plan, ARMS[arm], 1000)
    assert (found.num_turns, found.num_failed) == (plan.num_turns(), 0)
    assert found.computed_tokens == bench.replay(plan, ARMS["unbounded"], 1000).computed_tokens


def test_a_step_takes_longer_for_more_tokens_and_for_deeper_ones():
    timing = TIMINGS["cpu-26m"]
    costs = [timing.step_s(prompt, 0, 0) for prompt in ([], [(32, 0)], [(64, 0)], [(64, 4096)])]
    assert costs == sorted(set(costs))


def test_the_same_call_gives_the_same_figures(bench):
    plan = synthetic.fan_out(bench.vocabulary, num_parents=3, num_forks=4)
    runs = [bench.replay(plan, ARMS["impala-enforce"], 100) for _ in range(2)]
    assert dataclasses.asdict(runs[0]) == dataclasses.asdict(runs[1])
    assert runs[0].recomputed_tokens, "memory was never short: nothing was decided"


def test_sessions_are_slowed_by_a_load_that_evicts_them_and_hardly_by_a_small_one(bench):
    plan = synthetic.fan_out(bench.vocabulary, num_parents=12, num_forks=2, fork_turns=2)
    search = Search(bench, plan, ARMS["stock"], 120, seed=0)
    assert search.slowdown(1) < 4.0 < search.slowdown(24)
    assert search.live[1] < 4.0 < search.live[24]


def test_an_arms_switches_reach_the_scheduler():
    assert settings(ARMS["stock"]) is None
    found = settings(ARMS["impala-rank"])
    assert found is not None
    assert (found.config.rank.enabled, found.config.admission.enabled) == (True, False)


def test_bad_input_is_one_line_and_exit_2(tmp_path):
    for command in (main, sustained.main):
        done = CliRunner().invoke(command, ["--traces", str(tmp_path / "none.jsonl"), "--no-record"])
        assert done.exit_code == 2
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr
