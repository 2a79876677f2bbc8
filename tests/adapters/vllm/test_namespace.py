"""What a slab's contents are of: everything that makes KV differ is in its namespace, and nothing that does not."""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)

from impala_vllm.adapters.vllm import model_identity, tiering
from impala_vllm.adapters.vllm.offload_spec import ImpalaOffloadingSpec

PARALLEL = OffloadingParallelConfig(
    rank=0,
    world_size=2,
    tp_size=2,
    pp_size=1,
    pcp_size=1,
    dcp_size=1,
    data_parallel_index=0,
    data_parallel_size=1,
    data_parallel_rank_local=None,
    is_parallelism_agnostic=False,
)
CONFIG = OffloadingConfig(
    groups=(OffloadingGroupConfig(16, ("layers.0", "layers.1"), 0),),
    worker_kv_bytes_per_block=8192,
    enable_kv_cache_events=False,
    extra_config={"cpu_bytes_to_use": 1 << 20, tiering.EXTRA_KEY: {"identity": "model"}},
    engine_id="one",
    model=OffloadingModelConfig("model", "bfloat16"),
    cache=OffloadingCacheConfig(16, 2),
    parallel=PARALLEL,
    kv_cache_layout="NHD",
)


def namespace(**changes: Any) -> str:
    return ImpalaOffloadingSpec(dataclasses.replace(CONFIG, **changes))._namespace()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": OffloadingModelConfig("model", "float16")},
        {"groups": (OffloadingGroupConfig(16, ("layers.0", "layers.2"), 0),)},
        {"groups": (OffloadingGroupConfig(32, ("layers.0", "layers.1"), 0),)},
        {"worker_kv_bytes_per_block": 16384},
        {"cache": OffloadingCacheConfig(16, 4)},
        {"cache": OffloadingCacheConfig(8, 2)},
        {"parallel": dataclasses.replace(PARALLEL, tp_size=1, pp_size=2)},
        {"kv_cache_layout": "HND"},
        {"canonical_layout": True},
        {"extra_config": {**CONFIG.extra_config, tiering.EXTRA_KEY: {"identity": "other"}}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_kv_that_differs_has_a_namespace_of_its_own(changes: dict[str, Any]) -> None:
    assert namespace(**changes) != namespace()


@pytest.mark.parametrize(
    "changes",
    [
        {"engine_id": "two"},
        {"enable_kv_cache_events": True},
        {"extra_config": {**CONFIG.extra_config, "cpu_bytes_to_use": 1 << 21}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_restart_finds_its_kv_whatever_else_was_changed(changes: dict[str, Any]) -> None:
    assert namespace(**changes) == namespace()


@pytest.fixture
def vllm_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    hf_config = SimpleNamespace(to_json_string=lambda: "{}", _commit_hash="c0")
    model = SimpleNamespace(
        model=str(tmp_path), model_weights="", revision=None, quantization=None, hf_config=hf_config
    )
    return SimpleNamespace(
        model_config=model,
        load_config=SimpleNamespace(load_format="auto"),
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256"),
        folder=tmp_path,
    )


def identity(config: SimpleNamespace) -> str:
    return model_identity.identity(config, lambda line: None)


def said(config: SimpleNamespace) -> list[str]:
    """What is said of an identity that no other process has."""
    lines: list[str] = []
    assert model_identity.identity(config, lines.append) != model_identity.identity(config, lines.append)
    return lines[1:]


def without_commit(config: SimpleNamespace) -> None:
    config.model_config.hf_config._commit_hash = None


def without_files(config: SimpleNamespace) -> None:
    (config.folder / "model.safetensors").unlink()


def touch(config: SimpleNamespace) -> None:
    os.utime(config.folder / "model.safetensors", ns=(1, 1))


def take_one_file(config: SimpleNamespace) -> None:
    config.model_config.model = str(config.folder / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        touch,
        take_one_file,
        lambda c: (c.folder / "more.safetensors").touch(),
        lambda c: (c.folder / "part.pth").touch(),
        lambda c: (c.folder / "rank-0.tensors").touch(),
        lambda c: ((c.folder / "deep").mkdir(), (c.folder / "deep" / "q4.gguf").touch()),
        lambda c: setattr(c.load_config, "load_format", "dummy"),
        lambda c: setattr(c.model_config, "revision", "r1"),
        lambda c: setattr(c.model_config, "quantization", "fp8"),
        lambda c: setattr(c.model_config.hf_config, "_commit_hash", "c1"),
        lambda c: setattr(c.model_config.hf_config, "to_json_string", lambda: '{"rope_theta": 1}'),
        lambda c: setattr(c.cache_config, "prefix_caching_hash_algo", "sha256_cbor"),
    ],
    ids=[
        "touched",
        "file",
        "more",
        "pth",
        "tensors",
        "deep",
        "dummy",
        "revision",
        "quantization",
        "commit",
        "config",
        "hash",
    ],
)
def test_another_model_or_hash_scheme_is_another_identity(vllm_config: SimpleNamespace, change: Any) -> None:
    before = identity(vllm_config)
    assert identity(vllm_config) == before
    change(vllm_config)
    assert identity(vllm_config) != before


def test_a_weight_file_that_was_replaced_is_another_model(vllm_config: SimpleNamespace) -> None:
    take_one_file(vllm_config)
    before = identity(vllm_config)
    touch(vllm_config)
    assert identity(vllm_config) != before


def test_another_version_of_vllm_is_another_identity(
    vllm_config: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identity(vllm_config)
    monkeypatch.setattr("vllm.__version__", "0.32.99")
    assert identity(vllm_config) != before


def test_the_seed_of_hashes_is_part_of_it_and_a_random_one_never_comes_back(
    vllm_config: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identity(vllm_config)
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    assert identity(vllm_config) != before
    monkeypatch.delenv("PYTHONHASHSEED")
    vllm_config.cache_config.prefix_caching_hash_algo = "xxhash"
    (line,) = said(vllm_config)
    assert "set PYTHONHASHSEED" in line


def test_a_commit_or_weight_files_name_a_model(vllm_config: SimpleNamespace) -> None:
    without_commit(vllm_config)
    assert identity(vllm_config) == identity(vllm_config)
    without_files(vllm_config)
    vllm_config.model_config.hf_config._commit_hash = "c0"
    assert identity(vllm_config) == identity(vllm_config)
    without_commit(vllm_config)
    vllm_config.model_config.revision = "0123456789" * 4
    assert identity(vllm_config) == identity(vllm_config)


def test_weights_that_nothing_names_never_come_back(vllm_config: SimpleNamespace) -> None:
    without_commit(vllm_config)
    without_files(vllm_config)
    (vllm_config.folder / "config.json").touch()
    vllm_config.model_config.revision = "main"
    (line,) = said(vllm_config)
    assert line.startswith("what is on NVMe does not survive a restart: nothing tells these weights from others")


def test_weights_that_lie_elsewhere_are_not_named_by_what_is_here(vllm_config: SimpleNamespace) -> None:
    vllm_config.load_config.load_format = "tensorizer"
    assert said(vllm_config)
    vllm_config.load_config.load_format = "runai_streamer"
    assert identity(vllm_config) == identity(vllm_config)
    vllm_config.model_config.model_weights = "s3://bucket/model"
    assert said(vllm_config)
