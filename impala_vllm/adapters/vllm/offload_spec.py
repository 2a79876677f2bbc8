"""The OffloadingSpec that puts impala's tiers behind vLLM's OffloadingConnector.

Geometry is upstream's, so hybrid, MLA and tensor-parallel layouts come along; the manager is ours, and so is the worker
where our copies can move what the model has, else upstream's.
`tiering` chooses it and fills `kv_connector_extra_config`, whose key `impala` holds what is not upstream's.
"""

import contextlib
import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NoReturn

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.math_utils import round_up
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadingWorker,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.gpu_worker import CPUOffloadingWorker, pin_mmap_region
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from impala_vllm import ops
from impala_vllm.adapters.vllm.tiering import EXTRA_KEY
from impala_vllm.adapters.vllm.tiers import page_copy
from impala_vllm.adapters.vllm.tiers.manager import TierManager
from impala_vllm.adapters.vllm.tiers.nvme import NvmeTier
from impala_vllm.adapters.vllm.tiers.paced import PacedWorker
from impala_vllm.adapters.vllm.tiers.page_copy import LayoutError, PageCopyWorker
from impala_vllm.config import KvFormat, Swap
from impala_vllm.ops import Courier
from impala_vllm.transfer.block_io import open_block_io
from impala_vllm.transfer.limits import Limits, staging_bytes
from impala_vllm.transfer.nvme_store import NvmeStore
from impala_vllm.transfer.slab import Slab, SlabError

logger = init_logger("vllm.impala")


class ImpalaOffloadingSpec(TieringOffloadingSpec):
    """One host tier, and NVMe behind it where `impala.nvme_path` is set."""

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        """None of upstream's: the tiers' figures are in impala's part of /metrics."""
        return OffloadingSpec.build_metric_definitions(extra_config)

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        self._ours: dict[str, Any] = config.extra_config.get(EXTRA_KEY, {})
        self._tiers: TierManager | None = None
        self._mover: OffloadingWorker | None = None
        self._run_bytes = self._demoted_bytes() if self._ours.get("kv_format") == KvFormat.FP8.value else None
        """Of a block in host memory, as FP8; None: blocks are kept as they are."""
        if self._run_bytes is not None:
            num_copies = 1 if self.replicated_layout else config.parallel.world_size
            self.cpu_page_size_per_worker = self._run_bytes * self.blocks_per_chunk
            self.kv_bytes_per_chunk = round_up(self.cpu_page_size_per_worker * num_copies, self.BLOCK_SIZE_ALIGNMENT)
            self.num_chunks = int(config.extra_config["cpu_bytes_to_use"]) // self.kv_bytes_per_chunk

    def get_manager(self) -> OffloadingManager:
        if self._tiers is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=None,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            # Every worker has mapped it by now: without a name, no way to die can leave it behind any more.
            Path(region.mmap_path).unlink(missing_ok=True)
            region._creator = False
            self._tiers = TierManager(
                self.num_chunks,
                self.kv_bytes_per_chunk,
                self.tokens_per_block[0] * self.blocks_per_chunk,
                self._nvme(region),
                enable_events=self.kv_events_config.enable_kv_cache_events,
                on_shutdown=region.cleanup,
            )
            logger.info("impala: host tier of %d chunks", self.num_chunks)
        return self._tiers

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._mover is None:
            cap = self._ours.get("host_bytes_per_s")
            worker = self._build_worker(kv_caches)
            # Workers move their parts side by side.
            self._mover = PacedWorker(worker, float(cap) / self.config.parallel.world_size) if cap else worker
        return self._mover

    def _build_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._run_bytes is not None:
            return self._demoting_worker(kv_caches, self._run_bytes)
        if current_platform.is_cpu():
            region = self._region()
            return PageCopyWorker(page_copy.of_region(kv_caches, region, self.blocks_per_chunk), region.cleanup)
        with _saying_what_to_do():
            theirs = self.create_worker(kv_caches)
        if theirs._mmap_region is not None:
            own_name(theirs._mmap_region)
        try:
            worker = self._worker_over(theirs, kv_caches)
        except Exception as error:  # whatever compiler, driver or another vLLM raises: the other way is there
            logger.warning("impala: KV moves by vLLM's own swap: %s", (str(error).splitlines() or [repr(error)])[0])
            return theirs
        logger.info("impala: KV moves by impala's kernels and DMA")
        return worker

    def _worker_over(self, theirs: CPUOffloadingWorker, kv_caches: CanonicalKVCaches) -> PageCopyWorker:
        """Ours on the memory of upstream's, which has pinned it. Raises LayoutError and what drivers raise."""
        if self._ours.get("swap") == Swap.VLLM.value:
            raise LayoutError("tiers.swap asks for it")
        if self.config.canonical_layout or theirs._mmap_region is None:
            raise LayoutError("the host's layout is not a worker's own")
        handler = theirs._store_handler
        room = page_copy.of_tensors(
            handler.src_tensors, handler.dst_tensors, kv_caches.group_data_refs, self.blocks_per_chunk
        )
        return PageCopyWorker(room, theirs.shutdown, self._proven_courier(room))

    def _demoting_worker(self, kv_caches: CanonicalKVCaches, run_bytes: int) -> PageCopyWorker:
        """Raises where it cannot be: upstream's worker does not know FP8, so there is no other way."""
        region = self._region()
        if not current_platform.is_cpu():
            pin_mmap_region(region)
        room = page_copy.of_runs(kv_caches, region, self.blocks_per_chunk, run_bytes)
        courier = None if current_platform.is_cpu() else self._proven_courier(room)
        logger.info("impala: KV below HBM is FP8, at a loss: answers may differ from stock vLLM's")
        return PageCopyWorker(room, region.cleanup, courier)

    def _region(self) -> SharedOffloadRegion:
        with _saying_what_to_do():
            region = host_region(self)
        own_name(region)
        return region

    def _proven_courier(self, room: page_copy.Room) -> Courier:
        """The worker's own, with streams and buffers that it keeps. Raises as `page_copy.prove`."""
        device = room.pools[0].hbm.device
        self._check_kernels(device)
        courier = Courier(device)
        page_copy.prove(room, courier)
        return courier

    def _check_kernels(self, device: torch.device) -> None:
        if device.type != "cuda" or not ops.has_triton(device):
            raise LayoutError(f"no kernels on {device.type} here")

    def _demoted_bytes(self) -> int | None:
        """Room for a block's run in any layout of its layers; None, with a line, for KV that is not demoted."""
        config, num_bytes = self.config, self.config.worker_kv_bytes_per_block
        if len(config.groups) != 1 or config.canonical_layout or config.model.dtype != "bfloat16" or not num_bytes:
            logger.warning("impala: tiers keep KV as it is: fp8 wants bfloat16 and one KV cache group")
            return None
        return ops.most_demoted_bytes(num_bytes, len(config.groups[0].layer_names))

    def _nvme(self, region: SharedOffloadRegion) -> NvmeTier | None:
        directory = self._ours.get("nvme_path")
        if not directory:
            return None
        if len(self.config.groups) != 1:
            logger.warning("impala: no NVMe tier: it cannot tell the model's several KV cache groups apart yet")
            return None
        num_bytes, name = int(self._ours["nvme_bytes"]), f"dp{self.config.parallel.data_parallel_index}"
        try:
            slab = Slab.open(directory, num_bytes, self.kv_bytes_per_chunk, self._namespace(), name=name)
        except SlabError as error:
            _leave(error)
        limits = Limits(
            max_queued_write_bytes=staging_bytes(self.num_chunks * self.kv_bytes_per_chunk, self.kv_bytes_per_chunk),
            read_bytes_per_s=self._ours.get("nvme_read_bytes_per_s"),
            write_bytes_per_s=self._ours.get("nvme_write_bytes_per_s"),
        )
        memory = region.base_tensor.view(torch.uint8).view(-1).numpy().data
        row_bytes = len(memory) // self.num_chunks
        recovered, slab.recovered = slab.recovered, {}
        # Past this the disk hangs; what has not begun there is then given back, its room in host with it.
        io = open_block_io(slab.fd, limits.depth, 2 * limits.stuck_s, memory)
        store = NvmeStore(slab, io, limits)
        logger.info(
            "impala: NVMe tier of %d chunks in %s, %d filled, its index read in %.1f s, by %s",
            *(slab.num_slots, directory, len(recovered), slab.scan_s, io.name),
        )

        def row(slot: int) -> memoryview:
            return memory[slot * row_bytes : (slot + 1) * row_bytes]

        return NvmeTier(store, slab.num_slots, recovered, row, self.kv_bytes_per_chunk)

    def _namespace(self) -> str:
        """Digest of everything that makes the bytes of a chunk differ, or its key mean something else."""
        config = self.config
        parts = {
            "identity": self._ours.get("identity"),
            "dtype": config.model.dtype,
            "groups": [(g.tokens_per_block, g.layer_names) for g in config.groups],
            "block_bytes": config.worker_kv_bytes_per_block,
            "chunk": [self.blocks_per_chunk, self.tokens_per_hash, self.kv_bytes_per_chunk],
            "parallel": [config.parallel.world_size, config.parallel.tp_size, config.parallel.pp_size],
            "layout": [config.kv_cache_layout, config.canonical_layout, self.replicated_layout],
            "run_bytes": self._run_bytes,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _leave(error: SlabError) -> NoReturn:
    """End an engine process with one line: vLLM would print a traceback in every process. In-process, raise."""
    logger.error("impala: %s", error)
    if multiprocessing.parent_process() is not None:
        raise SystemExit(1)
    raise error


@contextlib.contextmanager
def _saying_what_to_do() -> Iterator[None]:
    """Around the making of the host tier's memory, which another server may have taken since it was looked for."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        logger.error(
            "impala: no host tier: %s; start again if another server started beside this one, or give "
            "--impala-host-gib G (0: no tiers)",
            (str(error).splitlines() or [repr(error)])[0],
        )
        raise


def own_name(region: SharedOffloadRegion) -> None:
    """Whoever made the region's file takes its name away at its end, in case a start fails before `get_manager` has.

    The region's own `cleanup` would not be called then, and would warn of a name that is gone in all other cases.
    """
    if region._creator:
        region._creator = False
        Finalize(region, _unlink, (region.mmap_path,), exitpriority=0)


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def host_region(spec: TieringOffloadingSpec) -> SharedOffloadRegion:
    """A worker's view of the region that the tiers share."""
    return SharedOffloadRegion(
        engine_id=spec._engine_id,
        num_chunks=spec.num_chunks,
        rank=0 if spec.replicated_layout else spec.config.parallel.rank,
        kv_bytes_per_chunk=spec.kv_bytes_per_chunk,
        cpu_page_size=spec.cpu_page_size_per_worker,
    )
