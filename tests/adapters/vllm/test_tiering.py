"""What a server's tiers become: sizes, and whose connector wins."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from impala_vllm.adapters.vllm import tiering
from impala_vllm.adapters.vllm.tiering import EXTRA_KEY, GIB
from impala_vllm.config import Config, ConfigError, KvFormat, Mode, Swap, TiersConfig

TIERS = TiersConfig(host_gib=8.0, nvme_path="/kv", nvme_gib=64.0)
CPU, GPU, OTHER = ("cpu", True, False), ("cuda", False, True), ("npu", False, False)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """What this machine has: kind of platform, free memory and shared memory, in GiB; a CPU with enough, at first."""

    def have(platform=CPU, free_gib=64.0, shm_gib=64.0, num_accelerators=2, limit_gib=None):
        name, is_cpu, is_gpu = platform
        fake = SimpleNamespace(device_name=name, is_cpu=lambda: is_cpu, is_cuda_alike=lambda: is_gpu)
        fake.is_xpu = lambda: False
        monkeypatch.setattr(tiering, "_platform", lambda: fake)
        monkeypatch.setattr(tiering.free_memory, "of_machine", lambda: int(free_gib * GIB))
        monkeypatch.setattr(tiering.free_memory, "of_container", lambda: limit_gib and int(limit_gib * GIB))
        monkeypatch.setattr(tiering, "_shm_gib", lambda: shm_gib)
        monkeypatch.setattr(tiering.accelerators, "count", lambda: num_accelerators)

    have()
    return have


def build(settings, num_local=1, connector=None, has_inner_state=False, nnodes=1, executor="mp", num_front_ends=1):
    """What `tiering` makes of the settings, and what it says."""
    args, said = SimpleNamespace(kv_transfer_config=connector, data_parallel_size_local=num_local), []
    args._api_process_rank, args._api_process_count = 0, num_front_ends
    args.tensor_parallel_size, args.pipeline_parallel_size, args.data_parallel_size = 2, 1, num_local
    model = SimpleNamespace(model="m", revision="0" * 40, quantization=None, hf_config=None, is_encoder_decoder=False)
    model.runner_type, model.has_inner_state = "generate", has_inner_state

    def build_config():
        return SimpleNamespace(
            kv_transfer_config=args.kv_transfer_config,
            model_config=model,
            load_config=SimpleNamespace(load_format="auto"),
            cache_config=SimpleNamespace(block_size=16, enable_prefix_caching=True, prefix_caching_hash_algo="sha256"),
            parallel_config=SimpleNamespace(
                data_parallel_size_local=num_local,
                nnodes_within_dp=nnodes,
                distributed_executor_backend=executor,
                world_size=4,
            ),
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


class SomebodysExecutor:
    """Of a user's own executor class, its name."""


SPREAD = [
    ({"nnodes": 2}, "a replica spans 2 nodes"),
    ({"executor": "ray"}, "the ray executor may place workers on several hosts"),
    ({"executor": "external_launcher"}, "the external_launcher executor may"),
    ({"executor": SomebodysExecutor}, "the SomebodysExecutor executor may"),
]


@pytest.mark.parametrize(("spread", "says"), SPREAD)
def test_nvme_is_refused_where_workers_have_other_memory_than_the_scheduler(spread, says):
    with pytest.raises(ConfigError, match=says) as refused:
        build(Config(tiers=TIERS), **spread)
    assert "tiers.nvme_path /kv" in str(refused.value)
    assert "drop --impala-nvme-path" in str(refused.value)


@pytest.mark.parametrize(("spread", "says"), SPREAD)
def test_several_hosts_have_a_host_tier_where_its_size_is_given(machine, spread, says):
    machine(GPU)
    assert build(Config(tiers=TiersConfig(host_gib=8.0)), **spread)[0] is not None
    connector, (said,) = build(Config(), **spread)
    assert connector is None
    assert says in said
    assert "give --impala-host-gib G" in said


def test_one_host_has_nvme_whatever_its_executor_is_called():
    for executor in (None, "mp", "uni"):
        assert build(Config(tiers=TIERS), executor=executor)[0] is not None


def test_a_gpu_has_a_host_tier_by_default_and_nothing_else_has(machine):
    machine(GPU, free_gib=64.0)
    assert build(Config())[0].kv_connector_extra_config["cpu_bytes_to_use"] == 16 * GIB
    for platform in (CPU, OTHER):
        machine(platform)
        assert build(Config()) == (None, [])


@pytest.mark.parametrize(
    ("shm_gib", "says"), [(None, "no host tier: there is no /dev/shm;"), (0.0625, "no host tier: 0.1 GiB of shared")]
)
def test_a_default_start_goes_on_without_shared_memory(machine, shm_gib, says):
    machine(GPU, shm_gib=shm_gib)
    connector, (said,) = build(Config())
    assert connector is None
    assert said.startswith(says)


@pytest.mark.parametrize(
    ("num_accelerators", "num_local", "gib"), [(0, 1, 16), (1, 1, 16), (2, 1, 16), (4, 1, 16), (8, 1, 8), (8, 4, 16)]
)
def test_a_server_leaves_room_for_those_on_the_machines_other_accelerators(machine, num_accelerators, num_local, gib):
    machine(GPU, num_accelerators=num_accelerators)  # two are used a rank
    extra = build(Config(), num_local)[0].kv_connector_extra_config
    assert extra["cpu_bytes_to_use"] * num_local == gib * GIB


@pytest.mark.parametrize(("limit_gib", "gib"), [(32, 8), (1000, 16)])
def test_a_container_has_a_share_of_what_its_limit_leaves_if_that_is_less(machine, limit_gib, gib):
    machine(GPU, limit_gib=limit_gib)
    assert build(Config())[0].kv_connector_extra_config["cpu_bytes_to_use"] == gib * GIB


def test_a_containers_own_memory_is_not_for_servers_on_other_accelerators(machine):
    machine(GPU, free_gib=1000.0, limit_gib=32, num_accelerators=8)
    assert build(Config())[0].kv_connector_extra_config["cpu_bytes_to_use"] == 8 * GIB


def test_the_least_of_memory_and_shared_memory_sizes_the_default(machine):
    machine(GPU, free_gib=1000.0, shm_gib=10.0)
    assert build(Config())[0].kv_connector_extra_config["cpu_bytes_to_use"] == 8 * GIB


@pytest.mark.parametrize(
    ("tiers", "has", "says"),
    [
        (TIERS, {"platform": OTHER}, "tiers.host_gib: .* this platform is npu: drop"),
        (TIERS, {"shm_gib": None}, "tiers.host_gib: /dev/shm is not there"),
        (TIERS, {"shm_gib": 4.0}, "tiers.host_gib: /dev/shm has 4.00 GiB to spare, not 8; lower it"),
        (replace(TIERS, host_gib=None), {"shm_gib": 0.0625}, "without tiers.host_gib: /dev/shm has 0.06 GiB .* not 1;"),
        (replace(TIERS, host_gib=None), {"shm_gib": None}, "tiers.nvme_path, without tiers.host_gib: /dev/shm is not"),
    ],
    ids=["platform", "no shm", "little shm", "nvme alone", "nvme alone, no shm"],
)
def test_what_was_asked_for_and_cannot_be_is_refused_with_the_way_out(machine, tiers, has, says):
    machine(**has)
    with pytest.raises(ConfigError, match=says):
        build(Config(tiers=tiers))


def test_front_ends_that_start_beside_the_engines_do_not_mind_their_memory(machine):
    machine(shm_gib=1.0)
    assert build(Config(tiers=TIERS), num_front_ends=4)[0] is not None
    assert build(Config(tiers=TIERS), num_local=0)[0] is not None
