"""Which worker a platform gets, whose memory it uses, and how FP8 halves the room; a CPU stands in for a GPU."""

import gc
import multiprocessing
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor, GPULoadStoreSpec
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from impala_vllm.adapters.vllm import offload_spec
from impala_vllm.adapters.vllm.offload_spec import ImpalaOffloadingSpec
from impala_vllm.adapters.vllm.tiers.page_copy import LayoutError, PageCopyWorker
from impala_vllm.ops import courier

PAGE, NUM_LAYERS, NUM_BLOCKS, PER_CHUNK = 4096, 4, 8, 2
HOST_BYTES = 1 << 20
MakeSpec = Callable[..., ImpalaOffloadingSpec]


@pytest.fixture
def make() -> Iterator[MakeSpec]:
    made: list[ImpalaOffloadingSpec] = []

    def spec(num_groups: int = 1, **ours: object) -> ImpalaOffloadingSpec:
        config = OffloadingConfig(
            groups=tuple(
                OffloadingGroupConfig(16, tuple(f"{g}.{i}" for i in range(NUM_LAYERS)), g) for g in range(num_groups)
            ),
            worker_kv_bytes_per_block=NUM_LAYERS * PAGE,
            enable_kv_cache_events=False,
            extra_config={"cpu_bytes_to_use": HOST_BYTES, "impala": ours},
            engine_id=f"test-{uuid.uuid4()}",
            model=OffloadingModelConfig("a model", "bfloat16"),
            cache=OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=PER_CHUNK),
            parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, False),
        )
        made.append(ImpalaOffloadingSpec(config))
        return made[-1]

    yield spec
    for one in made:
        if one._mover is not None:
            one._mover.shutdown()
        path = f"/dev/shm/vllm_offload_{one._engine_id}.mmap"
        if os.path.exists(path):  # the manager's to take away, and there is none here
            os.unlink(path)


def _caches() -> tuple[list[torch.Tensor], CanonicalKVCaches]:
    generator = torch.Generator().manual_seed(3)
    layers = [torch.randn(NUM_BLOCKS, PAGE // 2, generator=generator).to(torch.bfloat16) for _ in range(NUM_LAYERS)]
    tensors = [CanonicalKVCacheTensor(layer.view(torch.int8), PAGE) for layer in layers]
    return layers, CanonicalKVCaches(tensors, [[CanonicalKVCacheRef(i, PAGE) for i in range(NUM_LAYERS)]])


class Named:
    """Of a region, its name."""

    def __init__(self, mmap_path: str) -> None:
        self.mmap_path = mmap_path
        self._creator = True


class Theirs:
    """Of vLLM's worker, what ours is built on."""

    def __init__(self, caches: CanonicalKVCaches) -> None:
        rows = torch.zeros(4, NUM_LAYERS * PER_CHUNK * PAGE, dtype=torch.int8)
        self.rows = list(rows.split(PER_CHUNK * PAGE, dim=1))
        self._store_handler = SimpleNamespace(src_tensors=[t.tensor for t in caches.tensors], dst_tensors=self.rows)
        self._mmap_region = Named("/dev/shm/impala-test-theirs")
        self.is_shut_down = False

    def shutdown(self) -> None:
        self.is_shut_down = True


def _on_gpu(monkeypatch: pytest.MonkeyPatch, theirs: Theirs, *, has_kernels: bool = True) -> None:
    monkeypatch.setattr(offload_spec, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(ImpalaOffloadingSpec, "create_worker", lambda self, kv_caches: theirs)
    if has_kernels:
        monkeypatch.setattr(ImpalaOffloadingSpec, "_check_kernels", lambda self, device: None)


def _there_and_back(worker: Any) -> None:
    worker.submit_store(1, GPULoadStoreSpec([1, 2, 3], [3], [1]), CPULoadStoreSpec([3, 0]))
    worker.submit_load(2, CPULoadStoreSpec([3, 0]), GPULoadStoreSpec([5, 6, 7], [3], [1]))
    assert len(worker.get_finished()) == 2


def test_on_a_cpu_our_copies_move_kv(make: MakeSpec) -> None:
    layers, caches = _caches()
    worker = make().get_worker(caches)
    assert isinstance(worker, PageCopyWorker)
    _there_and_back(worker)
    assert all(torch.equal(layer[5:8], layer[1:4]) for layer in layers)


def test_on_a_gpu_our_copies_use_the_memory_that_vllms_worker_pinned(
    make: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, caches = _caches()
    theirs = Theirs(caches)
    _on_gpu(monkeypatch, theirs)
    before = [layer.clone() for layer in layers]
    worker = make().get_worker(caches)
    assert isinstance(worker, PageCopyWorker)
    assert all(torch.equal(a, b) for a, b in zip(layers, before, strict=True))
    assert not theirs._mmap_region._creator
    _there_and_back(worker)
    assert torch.equal(theirs.rows[0][3, PAGE:], layers[0][1].view(torch.int8))
    assert all(torch.equal(layer[5:8], layer[1:4]) for layer in layers)
    assert not theirs.is_shut_down
    worker.shutdown()
    assert theirs.is_shut_down


@pytest.mark.parametrize("has_gpu", [False, True])
def test_host_memory_that_another_server_took_ends_the_start_with_the_way_out(
    make: MakeSpec, monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Insufficient space in /dev/shm\nand more")

    if has_gpu:
        _on_gpu(monkeypatch, Theirs(_caches()[1]))
        monkeypatch.setattr(ImpalaOffloadingSpec, "create_worker", refuse)
    monkeypatch.setattr(offload_spec, "SharedOffloadRegion", refuse)
    said: list[str] = []
    monkeypatch.setattr(offload_spec.logger, "error", lambda line, *args: said.append(line % args))
    with pytest.raises(RuntimeError, match="Insufficient"):
        make().get_worker(_caches()[1])
    assert said[0].startswith("impala: no host tier: Insufficient space in /dev/shm; start again")


def test_the_name_of_host_memory_goes_with_the_worker_where_no_manager_took_it(make: MakeSpec) -> None:
    spec = make()
    path = Path(f"/dev/shm/vllm_offload_{spec._engine_id}.mmap")
    worker = spec.get_worker(_caches()[1])
    gc.collect()
    assert path.exists(), "the manager has not mapped it yet"
    worker.shutdown()
    spec._mover = None
    del worker
    gc.collect()
    assert not path.exists()


def _fail_to_start(path: str) -> None:
    region: Any = Named(path)
    offload_spec.own_name(region)
    os.close(2)  # a traceback says nothing new
    raise RuntimeError("no start")


def test_a_start_that_fails_leaves_no_host_memory_behind(tmp_path: Path) -> None:
    path = tmp_path / "region"
    path.touch()
    child = multiprocessing.get_context("fork").Process(target=_fail_to_start, args=(str(path),))
    child.start()
    child.join()
    assert child.exitcode == 1
    assert not path.exists()


def test_vllms_worker_is_kept_where_ours_cannot_be_or_is_not_wanted(
    make: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, caches = _caches()
    theirs: Any = Theirs(caches)
    _on_gpu(monkeypatch, theirs, has_kernels=False)
    assert make().get_worker(caches) is theirs, "there are no kernels here"
    _on_gpu(monkeypatch, theirs)
    assert make(swap="vllm").get_worker(caches) is theirs
    monkeypatch.setattr(courier.dispatch, "swap_pages", lambda *_: None)
    assert make().get_worker(caches) is theirs, "bytes were lost"
    theirs._mmap_region = None
    assert make().get_worker(caches) is theirs
    assert not theirs.is_shut_down


def test_fp8_halves_what_a_chunk_takes_and_keeps_kv_within_its_error(make: MakeSpec) -> None:
    exact, demoted = make(), make(kv_format="fp8")
    assert demoted.kv_bytes_per_chunk <= 0.5 * exact.kv_bytes_per_chunk + 4096
    assert demoted.num_chunks * demoted.kv_bytes_per_chunk <= HOST_BYTES
    assert demoted.num_chunks > 1.5 * exact.num_chunks
    assert demoted._namespace() != exact._namespace()
    layers, caches = _caches()
    before = [layer.float() for layer in layers]
    worker = demoted.get_worker(caches)
    assert isinstance(worker, PageCopyWorker)
    assert worker.is_demoting
    _there_and_back(worker)
    for layer, old in zip(layers, before, strict=True):
        assert torch.allclose(layer[5:8].float(), old[1:4], rtol=1 / 16, atol=2.0**-16)
        assert torch.equal(layer[:5].float(), old[:5])


def test_fp8_is_for_one_group_and_others_keep_kv_as_it_is(make: MakeSpec) -> None:
    assert make(num_groups=2, kv_format="fp8").kv_bytes_per_chunk == make(num_groups=2).kv_bytes_per_chunk


def test_fp8_on_a_gpu_without_kernels_does_not_start(make: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    _, caches = _caches()
    _on_gpu(monkeypatch, Theirs(caches), has_kernels=False)
    monkeypatch.setattr(offload_spec, "pin_mmap_region", lambda region: None)
    with pytest.raises(LayoutError, match="no kernels"):
        make(kv_format="fp8").get_worker(caches)
