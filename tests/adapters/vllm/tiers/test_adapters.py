"""Which adapters' requests tiers serve: those whose weights are what their name and path meant first."""

import pytest

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest

from impala_vllm.adapters.vllm.tiers.adapters import Adapters


def adapter(number: int = 1, name: str = "a", path: str = "/a", load_inplace: bool = False) -> LoRARequest:
    return LoRARequest(name, number, path, load_inplace=load_inplace)


def test_an_adapter_that_stays_uses_tiers() -> None:
    seen = Adapters()
    assert all(seen.may_use_tiers(adapter()) for _ in range(3))


def test_weights_loaded_anew_under_the_same_name_and_path_do_not() -> None:
    seen = Adapters()
    assert seen.may_use_tiers(adapter(1))
    assert not seen.may_use_tiers(adapter(2))
    assert seen.may_use_tiers(adapter(1)), "its KV is all there is"


def test_another_path_or_name_is_another_adapter() -> None:
    seen = Adapters()
    assert seen.may_use_tiers(adapter(1))
    assert seen.may_use_tiers(adapter(1, path="/b"))
    assert seen.may_use_tiers(adapter(2, name="b"))


def test_after_a_reload_in_place_nothing_under_that_name_and_path_does() -> None:
    seen = Adapters()
    assert seen.may_use_tiers(adapter(1))
    assert not seen.may_use_tiers(adapter(1, load_inplace=True))
    assert not seen.may_use_tiers(adapter(1))
    assert not seen.may_use_tiers(adapter(2))
