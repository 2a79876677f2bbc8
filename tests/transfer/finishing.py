"""Waits for a store on a real disk."""

import time

from impala_vllm.transfer.jobs import Result
from impala_vllm.transfer.nvme_store import NvmeStore

LONG_S = 120.0


def finish(store: NvmeStore) -> dict[int, Result]:
    """Wait for all that is under way."""
    results: list[Result] = []
    give_up_s = time.monotonic() + LONG_S
    while store.num_jobs:
        assert time.monotonic() < give_up_s
        time.sleep(0.001)
        results += store.poll()
    return {result.job_id: result for result in results}
