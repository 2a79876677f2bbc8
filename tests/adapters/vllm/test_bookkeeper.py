"""The ledger of vLLM's own scheduler, without a model: its sums are vLLM's, whatever happens to the requests."""

import json
import random
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.metrics.stats import PromptTokenStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from benchmarks.virtual import clock
from benchmarks.virtual.engine import TIMINGS, VirtualEngine
from benchmarks.virtual.tiers import Tiers
from impala_vllm.adapters.vllm import choice
from impala_vllm.adapters.vllm.snapshot import note_outcome, take
from impala_vllm.config import load
from impala_vllm.replay import synthetic
from impala_vllm.replay.load import Load, drive
from impala_vllm.replay.vocabulary import Vocabulary
from tests.adapters.vllm.schedulers import from_config

BOTH = pytest.mark.parametrize("asynchronous", [False, True])
MODES = pytest.mark.parametrize("mode", ["observe", "enforce"])


class Engine:
    """A scheduler with a ledger, and vLLM's own counters over what it puts out. Its clock is ours."""

    def __init__(self, model, path, mode="observe", asynchronous=False, num_blocks=64, **sizes):
        settings = load(None, {"mode": ("test", mode), "ledger.path": ("test", str(path))})
        args = EngineArgs(
            model=model, max_model_len=512, block_size=32, scheduler_cls=choice.Choice.of(settings), **sizes
        )
        config = args.create_engine_config()
        config.scheduler_config.async_scheduling = asynchronous
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(32, sha256)
        self.scheduler = from_config(config, num_blocks)
        self.path = path
        self.now = 100.0
        self.scheduler.observer.clock = lambda: self.now
        self.prompt = PromptTokenStats()
        self.num_generated = self.num_preempted = 0
        self.busy_s = 0.0
        self.finished = {}

    def add(self, name, prompt, max_tokens=8, **fields):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0, **fields)
        self.scheduler.add_request(Request(name, list(prompt), params, None, 0, self.now, block_hasher=self._hasher))

    def step(self, took_s=0.1):
        scheduled = self.scheduler.schedule()
        self.num_preempted += len(scheduled.preempted_req_ids or ())
        self.now += took_s
        if scheduled.total_num_scheduled_tokens:
            self.busy_s += took_s
        ids = list(scheduled.num_scheduled_tokens)
        requests = {i: self.scheduler.requests[i] for i in ids}
        sampled = [[] if requests[i].is_prefill_chunk else [50] for i in ids]
        output = ModelRunnerOutput(
            req_ids=ids, req_id_to_index={i: n for n, i in enumerate(ids)}, sampled_token_ids=sampled
        )
        for client in self.scheduler.update_from_output(scheduled, output).values():
            for answer in client.outputs:
                self.num_generated += len(answer.new_token_ids)
                if answer.prefill_stats is not None:
                    self.prompt.update_from_output(answer.prefill_stats)
                if answer.finished:
                    self.finished[answer.request_id] = list(requests[answer.request_id].all_token_ids)

    def run(self):
        while self.scheduler.has_requests():
            self.step()

    def close(self):
        """Every record, the newest of each trace, and those of no trace."""
        self.scheduler.shutdown()
        lines = []
        for file in (self.path, self.path.with_name(self.path.name + ".live")):
            if file.exists():
                lines += [json.loads(line) for line in file.read_bytes().splitlines()]
        return {line.get("trace") or line["run"]: line for line in lines if line["kind"] != "server"}


def total(lines, part, name):
    return sum(line.get(part, {}).get(name, 0) for line in lines.values())


def storm(engine, seed, num_agents=12, num_turns=5):
    """Agents whose turns are cut off, preempted, rewritten and repeated."""
    rng = random.Random(seed)
    histories = {a: [7] * 64 + [100 + a] * rng.randrange(10, 120) for a in range(num_agents)}
    left = dict.fromkeys(histories, num_turns)
    open_turns, due = {}, {a: engine.now + rng.random() for a in histories}
    while open_turns or any(left.values()):
        for agent in [a for a, due_s in due.items() if due_s <= engine.now and left[a]]:
            del due[agent]
            name = f"a{agent}n{left[agent]}-0123abcd"
            fields = {"prompt_logprobs": 1} if rng.random() < 0.05 else {}
            engine.add(name, histories[agent], rng.randrange(1, 12), **fields)
            open_turns[name] = agent
        if rng.random() < 0.05 and open_turns:
            gone = rng.choice(sorted(open_turns))
            engine.scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
            engine.finished[gone] = histories[open_turns[gone]]
        if engine.scheduler.has_requests():
            engine.step()
        else:
            engine.now += 0.1
        for name in [n for n in open_turns if n in engine.finished]:
            agent = open_turns.pop(name)
            left[agent] -= 1
            due[agent] = engine.now + rng.lognormvariate(0.0, 1.0)
            history = engine.finished[name]
            if rng.random() < 0.2:
                history = [*history[: len(history) // 2], 9, *history[len(history) // 2 + 1 :]]
            histories[agent] = [*history, *[200 + agent] * rng.randrange(4, 20)][:480]


@BOTH
@MODES
@pytest.mark.parametrize("seed", range(2))
def test_sums_over_the_ledger_are_vllms_counters(model, tmp_path, mode, asynchronous, seed):
    engine = Engine(model, tmp_path / "l.jsonl", mode, asynchronous, num_blocks=36)
    storm(engine, seed)
    lines = engine.close()
    assert total(lines, "tokens", "computed") == engine.prompt.computed
    assert total(lines, "tokens", "hbm") == engine.prompt.local_cache_hit
    assert sum(total(lines, "tokens", name) for name in ("host", "nvme", "other")) == 0
    assert total(lines, "tokens", "output") == engine.num_generated
    assert sum(line.get("preemptions", 0) for line in lines.values()) == engine.num_preempted
    assert sum(line["turns"] for line in lines.values()) == 60
    assert engine.prompt.computed > 0
    assert engine.prompt.local_cache_hit > 0
    assert total(lines, "again", "evicted") > 0
    assert total(lines, "again", "rewritten") > 0
    charged = sum(line.get("gpu_s", 0) for line in lines.values())
    assert charged + engine.scheduler.bookkeeper.book.uncharged_s == pytest.approx(engine.busy_s, rel=1e-3)
    for line in lines.values():
        stall = sum(line["stall"].values())
        assert stall + line.get("gap_s", 0.0) == pytest.approx(line["end"] - line["start"], abs=2e-2)


def test_a_preempted_turn_says_what_it_had_to_compute_again(model, tmp_path):
    engine = Engine(model, tmp_path / "l.jsonl", num_blocks=9)
    engine.add("a", [1] * 100, 60)
    engine.add("b", [2] * 100, 60)
    engine.run()
    lines = engine.close()
    assert engine.num_preempted > 0
    assert total(lines, "again", "preempted") > 0
    assert total(lines, "tokens", "computed") == engine.prompt.computed == 200


def test_held_turns_are_told_apart_from_queued_ones(model, tmp_path):
    engine = Engine(model, tmp_path / "l.jsonl", "enforce", num_blocks=24)
    storm(engine, 5, num_agents=30, num_turns=3)
    lines = engine.close()
    assert total(lines, "stall", "hold") > 1.0
    assert total(lines, "stall", "queue") > 0.0


def test_in_a_queue_without_policy_nobody_is_held(model, tmp_path):
    engine = Engine(model, tmp_path / "l.jsonl", num_blocks=24)
    storm(engine, 5, num_agents=30, num_turns=3)
    lines = engine.close()
    assert total(lines, "stall", "hold") == 0
    assert total(lines, "stall", "queue") > 1.0


def test_children_of_one_request_are_counted_each(model, tmp_path):
    engine = Engine(model, tmp_path / "l.jsonl")
    for i in range(3):
        engine.add(f"{i}_a", [1] * 70, 4)
    engine.run()
    (line,) = engine.close().values()
    assert (line["tokens"]["output"], line["turns"]) == (12, 3)
    assert sum(line["tokens"].get(name, 0) for name in ("computed", "hbm")) == engine.prompt.total == 210


def test_requests_that_belong_to_no_trace_are_in_the_sums(model, tmp_path):
    engine = Engine(model, tmp_path / "l.jsonl")
    engine.scheduler.observer.identity = None
    engine.add("a", [1] * 70, 4)
    engine.run()
    (line,) = engine.close().values()
    assert line["kind"] == "unlinked"
    assert (line["tokens"]["computed"], line["tokens"]["output"]) == (70, 4)


def test_no_prompt_and_no_name_is_in_it(model, tmp_path):
    engine = Engine(model, tmp_path / "l.jsonl")
    engine.add("a", [4001] * 70, 4, extra_args={"impala": {"session": "my name is secret", "tenant": "acme corp"}})
    engine.run()
    engine.close()
    text = "".join(file.read_text() for file in tmp_path.iterdir())
    assert "session" in text
    for word in ("secret", "acme", "4001", "tiny"):
        assert word not in text


def test_outcomes_are_noted_for_the_callers_own_traces_only(model, tmp_path):
    engine = Engine(model, tmp_path / "l.jsonl")
    for name, tenant in (("a-0123abcd", "one"), ("b-0123abcd", "two")):
        engine.add(name, [1] * 70, 4, extra_args={"impala": {"session": "s", "tenant": tenant}})
    engine.run()
    asked = {"outcome": "success", "tenant": "one", "score": 0.5}
    assert note_outcome(engine.scheduler, {**asked, "session_id": "s"}) == 1
    assert note_outcome(engine.scheduler, {**asked, "session_id": "other"}) == 0
    assert note_outcome(engine.scheduler, {**asked, "request_id": "b"}) == 0
    assert note_outcome(engine.scheduler, {**asked, "tenant": "two", "outcome": "failure", "request_id": "b"}) == 1
    outcomes = {line["outcome"]: line.get("score") for line in engine.close().values()}
    assert outcomes == {"success": 0.5, "failure": 0.5}


@pytest.mark.parametrize("hook", ["arrive", "scheduled", "stepping", "stepped", "finish", "preempting"])
def test_a_ledger_that_fails_is_switched_off_and_every_request_is_served(model, tmp_path, hook, monkeypatch):
    engine = Engine(model, tmp_path / "l.jsonl", num_blocks=9)

    def explode(*_):
        raise ValueError("inner details")

    monkeypatch.setattr(engine.scheduler.bookkeeper, hook, explode)
    monkeypatch.setattr(type(engine.scheduler.bookkeeper), hook, explode)
    engine.add("a", [1] * 100, 60)
    engine.add("b", [2] * 100, 60)
    engine.run()
    assert sorted(engine.finished) == ["a", "b"]
    assert engine.scheduler.bookkeeper is None
    assert take(engine.scheduler, 0)["ledger"] == {"on": False, "error": "ValueError"}


def test_a_record_that_cannot_be_made_does_not_take_the_snapshot_down(model, tmp_path, monkeypatch):
    engine = Engine(model, tmp_path / "l.jsonl")
    monkeypatch.setattr(engine.scheduler.bookkeeper.book, "tick", lambda now: 1 / 0)
    assert take(engine.scheduler, 0)["ledger"] == {"on": False, "error": "ZeroDivisionError"}


def test_without_a_ledger_there_is_no_bookkeeper(model):
    settings = load(None, {"mode": ("test", "observe")})
    config = EngineArgs(model=model, max_model_len=512, block_size=32, scheduler_cls=choice.Choice.of(settings))
    scheduler = from_config(config.create_engine_config())
    assert scheduler.bookkeeper is None
    assert take(scheduler, 0)["ledger"] is None
    assert note_outcome(scheduler, {"outcome": "success", "tenant": "", "session_id": "s"}) is None


@pytest.mark.parametrize(("tier", "host_blocks", "nvme_blocks"), [("host", 400, 0), ("nvme", 48, 2000)])
def test_tokens_from_tiers_are_told_apart_and_add_up_to_vllms_counter(model, tmp_path, tier, host_blocks, nvme_blocks):
    counted = PromptTokenStats()

    def count(scheduler):
        update = scheduler.update_from_output

        def counting(*args):
            outputs = update(*args)
            for answer in (o for client in outputs.values() for o in client.outputs):
                if answer.prefill_stats is not None:
                    counted.update_from_output(answer.prefill_stats)
            return outputs

        scheduler.update_from_output = counting

    async def serve():
        vocabulary = Vocabulary.of_model(Path(model))
        plan = synthetic.fan_out(vocabulary, num_parents=6, num_forks=6)
        settings = load(
            None, {"ledger.path": ("test", str(tmp_path / "l.jsonl")), "planner.gate_writes": ("test", False)}
        )
        tiers = Tiers("impala", host_blocks, nvme_blocks, host_rate=4000.0, nvme_read_rate=2000.0)
        async with VirtualEngine(
            Path(model), settings, TIMINGS["cpu-26m"], num_blocks=120, tiers=tiers, eos=vocabulary.eos
        ) as engine:
            count(engine.scheduler)
            done = await drive(plan, engine, Load())
            assert not [r for r in done.results if r.error is not None]
            engine.scheduler.bookkeeper.close()

    clock.run(serve())
    files = [tmp_path / "l.jsonl", tmp_path / "l.jsonl.live"]
    header, *lines = [json.loads(line) for file in files for line in file.read_bytes().splitlines()]
    by_trace = {line["trace"]: line for line in lines if line["kind"] == "trace"}
    found = {name: total(by_trace, "tokens", name) for name in ("host", "nvme", "other")}
    assert sum(found.values()) == counted.external_kv_transfer
    assert found[tier] > 0
    assert found["other"] == 0
    assert total(by_trace, "tokens", "computed") == counted.computed
    assert total(by_trace, "tokens", "hbm") == counted.local_cache_hit
    assert total(by_trace, "stall", "load") > 0.0
    assert (header["hbm"], header["host"], header.get("nvme", 0)) == (119 * 32, host_blocks * 32, nvme_blocks * 32)
