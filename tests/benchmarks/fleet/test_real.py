"""Two real engines behind the router, without the engines: the bound, how engines are started, what is recorded."""

import json
from random import Random

import pytest

from benchmarks.fleet import chats, real
from benchmarks.fleet.clients import Waited
from benchmarks.fleet.sessions import Step
from benchmarks.record import Origin
from impala_vllm.fleet.hashing import Prompts, Scheme
from impala_vllm.fleet.hashing.scheme import function
from impala_vllm.fleet.places import key_of
from impala_vllm.replay.arms import Machine
from impala_vllm.replay.server import ServerError

ORIGIN = Origin("abc", {"vllm": "1"}, "a machine", "a command")


@pytest.fixture(scope="module")
def asked(tokenizer):
    """Four sessions on two stems, which roll back at times."""
    words, lot = chats.Words(tokenizer), Random(1)
    sessions = []
    for number in range(4):
        keys = [key_of(1000 * (number % 2) + i) for i in range(30)]
        steps = []
        for turn in range(4):
            keys = [*keys[: lot.randrange(20, len(keys) + 1)], *(key_of(lot.getrandbits(60)) for _ in range(9 + turn))]
            steps.append(Step(list(keys), 256 * len(keys), 256, 160, 0.0))
        sessions.append(chats.recorded(steps, words, 16, 4.0))
    return sessions


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_is_what_a_cache_that_never_forgets_hits_in_any_order(asked, tokenizer, seed):
    prompts = Prompts(Scheme("sha256_cbor", function("sha256_cbor")("another"), 32), tokenizer)
    left, lot = [list(asks) for asks in asked], Random(seed)
    seen, hits, num_tokens = set(), 0, 0
    while any(left):
        prompt = prompts.of_chat({"messages": lot.choice([asks for asks in left if asks]).pop(0).messages})
        hits += 32 * next((i for i, key in enumerate(prompt.keys) if key not in seen), len(prompt.keys))
        seen.update(prompt.keys)
        num_tokens += prompt.num_tokens
    found = real.bound(asked, tokenizer, 32)
    assert found[:3] == (num_tokens, hits, len(seen))
    assert hits > 0.5 * num_tokens
    assert found.longest_tokens < num_tokens


def test_each_engine_publishes_its_events_and_has_a_core(tmp_path, monkeypatch):
    monkeypatch.setattr(real.os, "sched_getaffinity", lambda _: {5, 3})
    engines = real._engines(Machine(tmp_path, hbm_blocks=77), tmp_path)
    for engine, core in zip(engines, "35", strict=True):
        assert json.loads(engine.command[engine.command.index("--kv-events-config") + 1])["enable_kv_cache_events"]
        assert engine.command[engine.command.index("--num-gpu-blocks-override") + 1] == "77"
        assert engine._env["VLLM_CPU_OMP_THREADS_BIND"] == core
    assert len({engine.log for engine in engines}) == 2


def scraped(queries: float, hits: float) -> dict[str, float]:
    return {"vllm:prefix_cache_queries_total": queries, "vllm:prefix_cache_hits_total": hits}


def test_hits_are_the_engines_own_and_set_against_the_bound(capsys):
    before, after = [{}, scraped(100, 90)], [scraped(1000, 600), scraped(1100, 690)]
    limit = real.Bound(2000, 1500, 10, 100)
    waited = Waited(10.0, [1.0, 3.0], 0)
    found = real._figures(before, after, waited, limit)
    assert found == {"failures": 0, "hit_ratio": 0.6, "hits / bound": 0.8, "spread": 1.0, "stall_mean_s": 2.0}
    assert not capsys.readouterr().err
    real._figures(before, after, waited, limit._replace(prompt_tokens=3000))
    assert "2000 prompt tokens, 3000 were sent" in capsys.readouterr().err
    with pytest.raises(ServerError):
        real._figures(after, after, waited, limit)


def test_where_turns_failed_only_that_is_recorded():
    figures = dict.fromkeys(real.KINDS, 0.5)
    for failures, metrics in ((0, [*real.KINDS]), (2, ["failures"])):
        made = real.records({"impala": [{**figures, "failures": failures}]}, {}, 0, ORIGIN)
        assert [r.metric for r in made] == metrics
