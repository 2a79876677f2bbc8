"""The OffloadingSpec that puts impala's tiers behind vLLM's OffloadingConnector.

Geometry and the CUDA worker are upstream's, so hybrid, MLA and tensor-parallel layouts come along; the manager is ours.
`tiering` chooses it and fills `kv_connector_extra_config`, whose key `impala` holds what is not upstream's.
"""

import hashlib
import json
import multiprocessing
from pathlib import Path
from typing import Any, NoReturn

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadingWorker,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from impala_vllm.adapters.vllm.tiering import EXTRA_KEY
from impala_vllm.adapters.vllm.tiers.manager import TierManager
from impala_vllm.adapters.vllm.tiers.nvme import NvmeTier
from impala_vllm.adapters.vllm.tiers.paced import PacedWorker
from impala_vllm.adapters.vllm.tiers.row_copy import RowCopyWorker
from impala_vllm.transfer.block_io import open_block_io
from impala_vllm.transfer.limits import Limits
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

    def get_manager(self) -> OffloadingManager:
        if self._tiers is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=None,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            # Every worker has mapped it by now: without a name, no way to die can leave it behind.
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
            self._mover = PacedWorker(worker, float(cap)) if cap else worker
        return self._mover

    def _build_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if current_platform.is_cpu():
            region = host_region(self)
            worker: OffloadingWorker = RowCopyWorker(kv_caches, region, self.blocks_per_chunk)
        else:
            worker = self.create_worker(kv_caches)
            region = worker._mmap_region
        if region is not None:
            region._creator = False  # the scheduler takes the name away, see `get_manager`
        return worker

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
            read_bytes_per_s=self._ours.get("nvme_read_bytes_per_s"),
            write_bytes_per_s=self._ours.get("nvme_write_bytes_per_s"),
        )
        rows = region.base_tensor.view(torch.uint8).view(self.num_chunks, -1).numpy()
        recovered, slab.recovered = slab.recovered, {}
        logger.info("impala: NVMe tier of %d chunks in %s, %d filled", slab.num_slots, directory, len(recovered))
        store = NvmeStore(slab, open_block_io(slab.fd), limits)
        return NvmeTier(store, slab.num_slots, recovered, lambda slot: memoryview(rows[slot]), self.kv_bytes_per_chunk)

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
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _leave(error: SlabError) -> NoReturn:
    """End an engine process with one line: vLLM would print a traceback in every process. In-process, raise."""
    logger.error("impala: %s", error)
    if multiprocessing.parent_process() is not None:
        raise SystemExit(1)
    raise error


def host_region(spec: TieringOffloadingSpec) -> SharedOffloadRegion:
    """A worker's view of the region that the tiers share."""
    return SharedOffloadRegion(
        engine_id=spec._engine_id,
        num_chunks=spec.num_chunks,
        rank=0 if spec.replicated_layout else spec.config.parallel.rank,
        kv_bytes_per_chunk=spec.kv_bytes_per_chunk,
        cpu_page_size=spec.cpu_page_size_per_worker,
    )
