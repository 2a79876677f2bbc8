"""The scheduler class vLLM is given, built as the engine builds it but without an engine."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler as SyncScheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from impala_vllm.adapters.vllm import choice
from impala_vllm.adapters.vllm.enforcer import Enforcer
from impala_vllm.adapters.vllm.tiers.manager import TierManager
from impala_vllm.config import load
from tests.adapters.vllm.schedulers import build, from_config


@pytest.mark.parametrize(("asynchronous", "base"), [(False, SyncScheduler), (True, AsyncScheduler)])
def test_the_base_follows_the_final_configuration(model, asynchronous, base):
    scheduler = build(model, asynchronous)
    assert isinstance(scheduler, base)
    assert isinstance(scheduler, AsyncScheduler) is asynchronous
    assert scheduler.observer.identity is not None


def test_the_flag_does_not_decide_the_base(model):
    settings = load(None)
    args = EngineArgs(model=model, async_scheduling=True, scheduler_cls=choice.Choice.of(settings))
    config = args.create_engine_config()
    assert not config.scheduler_config.async_scheduling  # the CPU platform said no
    assert not isinstance(from_config(config), AsyncScheduler)


@pytest.mark.parametrize(("asynchronous", "base"), [(False, SyncScheduler), (True, AsyncScheduler)])
def test_mode_off_is_exactly_vllms_class(model, asynchronous, base):
    assert type(build(model, asynchronous, mode="off")) is base


def requests():
    init_none_hash(sha256)
    hasher = get_request_block_hasher(32, sha256)
    for i in range(12):
        prompt = [7] * 64 + [100 + i] * (20 + 40 * (i % 4))
        params = SamplingParams(max_tokens=40 + 3 * i, ignore_eos=True, temperature=0.0)
        yield Request(f"r{i}", prompt, params, None, arrival_time=float(i), block_hasher=hasher)


def drive(scheduler):
    """Serve the requests with a stand-in for the model; every decision the scheduler took."""
    decisions = []
    waiting = list(requests())
    for step in range(400):
        if waiting and step % 2 == 0:
            scheduler.add_request(waiting.pop(0))
        if step == 9:
            scheduler.finish_requests("r2", RequestStatus.FINISHED_ABORTED)
        if not scheduler.has_requests() and not waiting:
            break
        scheduled = scheduler.schedule()
        ids = list(scheduled.num_scheduled_tokens)
        sampled = [[] if scheduler.requests[i].is_prefill_chunk else [50] for i in ids]
        output = ModelRunnerOutput(
            req_ids=ids, req_id_to_index={i: n for n, i in enumerate(ids)}, sampled_token_ids=sampled
        )
        outputs = scheduler.update_from_output(scheduled, output)
        ended = sorted((o.request_id, str(o.finish_reason)) for c in outputs.values() for o in c.outputs if o.finished)
        decisions.append((dict(scheduled.num_scheduled_tokens), sorted(scheduled.finished_req_ids), ended))
    assert not scheduler.has_requests()
    return decisions


@pytest.mark.parametrize("asynchronous", [False, True])
def test_observing_changes_no_decision_even_when_kv_is_short(model, asynchronous):
    observed = build(model, asynchronous, num_blocks=18)
    decisions = drive(observed)
    assert decisions == drive(build(model, asynchronous, mode="off", num_blocks=18))
    finished = observed.observer.finished
    assert (finished["length"], finished["abort"]) == (11, 1)
    assert observed.observer.num_unfinished == 0
    assert observed.observer.heartbeat.busy_since_s is None
    assert observed.observer.heartbeat.num_steps == len(decisions)
    observed.observer.identity.check_invariants()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_finished_turns_are_told_with_final_tokens_only(model, asynchronous, monkeypatch):
    scheduler = build(model, asynchronous)
    told = {}
    monkeypatch.setattr(
        scheduler.observer.identity, "finish", lambda finish, now: told.update({finish.request_id: finish})
    )
    drive(scheduler)
    for i, request in enumerate(requests()):
        if i != 2:
            tokens = request.num_prompt_tokens + 40 + 3 * i
            assert (told[f"r{i}"].num_tokens, len(told[f"r{i}"].blocks)) == (tokens, tokens // 32)


def test_where_identity_fails_nothing_is_any_traces_any_more(model, monkeypatch):
    scheduler = build(model, mode="enforce")
    told = []
    monkeypatch.setattr(Enforcer, "forget_all", told.append)

    def fail(*_):
        raise ValueError("broken")

    monkeypatch.setattr(scheduler.observer.identity, "arrive", fail)
    for request in requests():
        scheduler.add_request(request)
    assert told == [scheduler.enforcer]


def test_tiers_have_nothing_of_an_adapter_whose_weights_were_loaded_anew(model):
    scheduler, manager = build(model, mode="enforce"), TierManager(4, 4096, 32)
    side = SimpleNamespace(manager=manager)
    scheduler.connector = SimpleNamespace(connector_scheduler=side, on_new_request=lambda request: None)
    for request, number in zip(requests(), (1, 2, 1), strict=False):
        request.lora_request = LoRARequest("adapter", number, "/adapter")
        scheduler.add_request(request)
    assert manager.turns.left_out == {"r1"}


def test_the_settings_survive_the_way_to_the_engine_process(model):
    import pickle

    settings = load(None, {"mode": ("--impala-mode", "enforce")})
    config = EngineArgs(model=model, scheduler_cls=choice.Choice.of(settings)).create_engine_config()
    assert choice.of(pickle.loads(pickle.dumps(config))) == settings


def test_a_scheduler_named_by_hand_takes_its_settings_from_the_environment(model, tmp_path, monkeypatch):
    (tmp_path / "i.yaml").write_text("identity:\n  max_traces: 5\n")
    monkeypatch.setenv(choice.CONFIG_VARIABLE, str(tmp_path / "i.yaml"))
    config = EngineArgs(model=model, scheduler_cls="impala_vllm.Scheduler").create_engine_config()
    assert choice.of(config).config.identity.max_traces == 5


def test_stock_engine_arguments_are_not_touched(model):
    config = EngineArgs(model=model).create_engine_config()
    assert not hasattr(config, "impala_settings")
    assert config.scheduler_config.scheduler_cls is None
