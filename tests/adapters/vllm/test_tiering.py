"""What a server's tiers become: sizes, and whose connector wins."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from impala_vllm.adapters.vllm import tiering
from impala_vllm.adapters.vllm.tiering import EXTRA_KEY, GIB
from impala_vllm.config import Config, ConfigError, KvFormat, Mode, Swap, TiersConfig

TIERS = TiersConfig(host_gib=8.0, nvme_path="/kv", nvme_gib=64.0)


def build(settings, num_local=1, connector=None, has_inner_state=False):
    """What `tiering` makes of the settings, and what it says."""
    args, said = SimpleNamespace(kv_transfer_config=connector), []
    model = SimpleNamespace(model="m", revision=None, quantization=None, hf_config=None, is_encoder_decoder=False)
    model.runner_type, model.has_inner_state = "generate", has_inner_state

    def build_config():
        return SimpleNamespace(
            kv_transfer_config=args.kv_transfer_config,
            model_config=model,
            cache_config=SimpleNamespace(block_size=16, enable_prefix_caching=True, prefix_caching_hash_algo="sha256"),
            parallel_config=SimpleNamespace(data_parallel_size_local=num_local),
        )

    return tiering.build(args, settings, build_config, said.append).kv_transfer_config, said


@pytest.mark.parametrize("num_local", [1, 4])
def test_ranks_of_one_machine_share_what_it_was_given(num_local):
    connector, said = build(Config(tiers=TIERS), num_local)
    extra = connector.kv_connector_extra_config
    assert extra["cpu_bytes_to_use"] * num_local == 8 * GIB
    assert extra[EXTRA_KEY]["nvme_bytes"] * num_local == 64 * GIB
    assert said == []


@pytest.mark.parametrize("num_local", [1, 4])
def test_a_cap_is_that_of_all_ranks_of_one_machine(num_local):
    caps = {"host_bytes_per_s": 8e9, "nvme_read_bytes_per_s": None, "nvme_write_bytes_per_s": 1e8}
    connector, _ = build(Config(tiers=replace(TIERS, **caps)), num_local)
    ours = connector.kv_connector_extra_config[EXTRA_KEY]
    assert (ours["host_bytes_per_s"] * num_local, ours["nvme_write_bytes_per_s"] * num_local) == (8e9, 1e8)
    assert ours["nvme_read_bytes_per_s"] is None


def test_a_connector_of_the_users_own_wins_and_is_said_once():
    connector, said = build(Config(tiers=TIERS), connector="theirs")
    assert connector == "theirs"
    assert said == ["your own KV connector is used; impala schedules above it and adds no tiers"]


def test_a_mode_that_decides_nothing_has_no_tiers():
    connector, said = build(Config(mode=Mode.OBSERVE, tiers=TIERS))
    assert connector is None
    assert said == ["tiers need --impala-mode enforce; none in mode observe"]


def test_the_spec_hears_how_kv_is_kept_and_who_copies_it():
    connector, _ = build(Config(tiers=TiersConfig(host_gib=8.0, kv_format=KvFormat.FP8, swap=Swap.VLLM)))
    ours = connector.kv_connector_extra_config[EXTRA_KEY]
    assert (ours["kv_format"], ours["swap"]) == ("fp8", "vllm")


def test_a_state_that_is_no_kv_is_not_kept_as_fp8():
    with pytest.raises(ConfigError, match="keeps a state"):
        build(Config(tiers=TiersConfig(host_gib=8.0, kv_format=KvFormat.FP8)), has_inner_state=True)
    assert build(Config(tiers=TiersConfig(host_gib=8.0)), has_inner_state=True)[0] is not None
