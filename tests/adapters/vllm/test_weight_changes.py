"""Which calls to the workers empty the tiers: those that change weights, whether they succeed or not."""

from types import SimpleNamespace
from typing import Any

import pytest

from impala_vllm.adapters.vllm import weight_changes


@pytest.mark.parametrize(
    "method",
    [
        *("start_weight_update", "update_weights", "finish_weight_update", "reload_weights", "reset_weights"),
        *("update_weights_from_ipc", "update_named_param", "load_weights", "receive_weights"),
    ],
)
def test_what_changes_weights_is_known_by_its_name(method: str) -> None:
    assert weight_changes.changes_weights(method)


def load_weights() -> None: ...


def test_a_function_has_a_name_too() -> None:
    assert weight_changes.changes_weights(load_weights)
    assert not weight_changes.changes_weights(object())


@pytest.mark.parametrize(
    "method", ["compute_weight_checksums", "init_weight_transfer_engine", "get_weight_version", "sleep", "apply_model"]
)
def test_what_only_looks_or_has_nothing_to_do_with_weights_changes_nothing(method: str) -> None:
    assert not weight_changes.changes_weights(method)


def test_the_scheduler_hears_of_it_after_the_call_and_where_it_fails() -> None:
    told: list[str] = []

    def call(self: Any, method: str, fails: bool = False) -> str:
        told.append(method)
        if fails:
            raise RuntimeError("half of it is done")
        return "done"

    watched = weight_changes._watched(call)
    engine = SimpleNamespace(scheduler=SimpleNamespace(weights_changed=lambda: told.append("emptied")))
    assert watched(engine, "update_weights") == "done"
    with pytest.raises(RuntimeError):
        watched(engine, "update_weights", fails=True)
    watched(engine, "sleep")
    watched(SimpleNamespace(), "update_weights")  # an engine that has no scheduler yet
    watched(SimpleNamespace(scheduler=object()), "update_weights")  # stock vLLM's
    assert told == [
        *("update_weights", "emptied", "update_weights", "emptied"),
        *("sleep", "update_weights", "update_weights"),
    ]


def test_the_engine_is_wrapped_once() -> None:
    core = pytest.importorskip("vllm.v1.engine.core")
    weight_changes.install_watch()
    wrapped = core.EngineCore.collective_rpc
    weight_changes.install_watch()
    assert core.EngineCore.collective_rpc is wrapped
