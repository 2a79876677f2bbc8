"""Whole jobs of the offloading worker, ours and vLLM's, over the layers of real models: whether every byte comes back,
what the engine's thread spends to submit one, and how long its bytes take.
"""

import random
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import device
from benchmarks.gpu.out import Out
from impala_vllm.ops import Courier
from impala_vllm.replay.measures import quantile

QUESTION = "micro/gpu-worker"
KIB = 1 << 10
SHAPES = {
    "8b, a tensor a layer": (36, 64 * KIB),
    "1b, a tensor a layer": (28, 64 * KIB),
    "8b, packed": (1, 36 * 64 * KIB),
    "MLA, 61 layers": (61, 18 * KIB),
}
"""Tensors, and bytes of a block of 16 tokens in each: both sizes of the sessions', and one whose loads go by kernel."""
BLOCKS = (2, 32, 256)
CHECKED = (1, 33, 500)
"""Blocks of the jobs whose bytes are compared, an odd number among them."""
PER_CHUNK = 2
NUM_CHUNKS = 512
REPETITIONS = 12
LIMIT_S = 30.0


def run(out: Out) -> None:
    """Both workers on the same memory, turn by turn. Raises AssertionError for bytes that did not come back."""
    place = device.get()
    is_real = place.type == "cuda"
    deadline: float | None = None
    shapes = SHAPES if is_real else {"rehearsal": (2, 64)}
    checked = CHECKED if is_real else (1, 7)
    for name, (num_tensors, page_bytes) in shapes.items():
        num_chunks = NUM_CHUNKS if is_real else 8
        pool = [
            device.device_bytes(num_chunks * PER_CHUNK * page_bytes, place).view(torch.int8).view(-1, page_bytes)
            for _ in range(num_tensors)
        ]
        host = device.host_bytes(num_chunks * PER_CHUNK * page_bytes * num_tensors, place).view(torch.int8)
        rows = list(host.view(num_chunks, -1).split(PER_CHUNK * page_bytes, dim=1))
        workers = _workers(pool, rows, is_real)
        # From here: the first call has imported vLLM.
        deadline = deadline or time.monotonic() + LIMIT_S
        for worker_name, worker in workers.items():
            for count in checked:
                check(worker, pool, count, num_chunks, f"{name}: {worker_name}, {count} blocks")
        out.line(f"{name}: {' and '.join(workers)} bring back every byte of {', '.join(map(str, checked))} blocks")
        for count in BLOCKS if is_real else (3,):
            if is_real and time.monotonic() > deadline:
                out.line(f"{name} and what follows: left out, no time")
                return
            for is_store in (True, False):
                _measure(out, workers, f"{name}, {'D2H' if is_store else 'H2D'}", count, num_chunks, is_store)


def _workers(pool: list[torch.Tensor], rows: list[torch.Tensor], is_real: bool) -> dict[str, Any]:
    from vllm.v1.kv_offload.base import CanonicalKVCacheRef
    from vllm.v1.kv_offload.cpu.gpu_worker import SingleDirectionOffloadingHandler

    from impala_vllm.adapters.vllm.tiers import page_copy

    refs = [[CanonicalKVCacheRef(i, tensor.shape[1]) for i, tensor in enumerate(pool)]]
    room = page_copy.of_tensors(pool, rows, refs, PER_CHUNK)
    courier = Courier(room.pools[0].hbm.device)
    page_copy.prove(room, courier)
    made: dict[str, Any] = {"impala": page_copy.PageCopyWorker(room, lambda: None, courier)}
    if is_real:
        made["vllm"] = _Theirs(
            *(SingleDirectionOffloadingHandler(pool, rows, PER_CHUNK, refs, way) for way in (True, False))
        )
    return made


class _Theirs:
    """vLLM's worker, of its two handlers."""

    def __init__(self, stores: Any, loads: Any) -> None:
        self._stores, self._loads = stores, loads
        self.submit_store: Callable[..., bool] = stores.transfer_async
        self.submit_load: Callable[..., bool] = loads.transfer_async

    def get_finished(self) -> list[Any]:
        return self._stores.get_finished() + self._loads.get_finished()

    def wait(self, job_ids: set[int]) -> None:
        self._stores.wait(job_ids)
        self._loads.wait(job_ids)


def check(worker: Any, pool: list[torch.Tensor], count: int, num_chunks: int, what: str) -> None:
    """Blocks of noise to the host and, once they are there, into other blocks: those and no others have changed, to
    the bytes that were sent. Loads read their source in any order, so the wait between is part of the promise."""
    from vllm.v1.kv_offload.base import GPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

    rng = random.Random(count)
    for tensor in pool:
        tensor.view(torch.uint8).random_(0, 256)
    some = rng.sample(range(num_chunks * PER_CHUNK), 2 * count)
    origin, to = some[:count], some[count:]
    chunks = CPULoadStoreSpec(rng.sample(range(num_chunks), -(-count // PER_CHUNK)))
    wanted = [tensor.clone() for tensor in pool]
    for tensor in wanted:
        tensor[to] = tensor[origin]
    worker.submit_store(-1, GPULoadStoreSpec(origin, [count], [0]), chunks)
    worker.wait({-1})
    for tensor in pool:  # what is loaded can only come from the host
        tensor[origin] = 0
    worker.submit_load(-2, chunks, GPULoadStoreSpec(to, [count], [0]))
    worker.wait({-2})
    worker.get_finished()
    for number, (tensor, expected) in enumerate(zip(pool, wanted, strict=True)):
        expected[origin] = 0
        assert torch.equal(tensor, expected), f"{what}: tensor {number} has other bytes"


def _measure(out: Out, workers: dict[str, Any], what: str, count: int, num_chunks: int, is_store: bool) -> None:
    from vllm.v1.kv_offload.base import GPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

    rng = random.Random(count)
    submit_s: dict[str, list[float]] = {name: [] for name in workers}
    rates: dict[str, list[float]] = {name: [] for name in workers}
    for repetition in range(REPETITIONS if len(workers) > 1 else 2):
        gpu = GPULoadStoreSpec(rng.sample(range(num_chunks * PER_CHUNK), count), [count], [0])
        cpu = CPULoadStoreSpec(rng.sample(range(num_chunks), -(-count // PER_CHUNK)))
        for name, worker in workers.items():
            began = time.perf_counter()
            if is_store:
                worker.submit_store(repetition, gpu, cpu)
            else:
                worker.submit_load(repetition, cpu, gpu)
            took_s = time.perf_counter() - began
            worker.wait({repetition})
            (result,) = worker.get_finished()
            if repetition >= 2 or len(workers) == 1:
                submit_s[name].append(took_s)
                rates[name].append(result.transfer_size / max(result.transfer_time, 1e-9))
    said: list[str] = []
    where = f"{what}, {count} blocks"
    for name in workers:
        rate = out.figure(QUESTION, name, where, "GB/s", [r / 1e9 for r in rates[name]], better="higher")
        out.figure(QUESTION, name, f"submit, {where}", "us", [s * 1e6 for s in submit_s[name]], better="lower")
        said.append(f"{name} {rate:.1f} GB/s, submitted in {quantile(submit_s[name], 0.5) * 1e6:.0f} us")
    out.line(f"{where}: {'; '.join(said)}")
