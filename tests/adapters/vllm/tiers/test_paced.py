"""A link below a rate: when jobs are said to be done, by a clock of ours."""

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import GPULoadStoreSpec, LoadStoreSpec, OffloadingWorker, TransferResult

from impala_vllm.adapters.vllm.tiers.paced import PacedWorker
from tests.transfer.virtual import ManualClock

RATE = 100.0
GPU, HOST = GPULoadStoreSpec([], [], []), LoadStoreSpec()


class Immediate(OffloadingWorker):
    """Done at once: a job of so many bytes as its number says, in no time worth telling."""

    def __init__(self) -> None:
        self.finished: list[TransferResult] = []
        self.waited_for: list[set[int]] = []
        self.is_shut_down = False

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        self.finished.append(TransferResult(job_id, True, job_id, 1e-6))
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        self.finished.append(TransferResult(job_id, True, job_id, 1e-6))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        self.waited_for.append(job_ids)

    def shutdown(self) -> None:
        self.is_shut_down = True


class Link:
    """A paced worker and the test's clock."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.inner = Immediate()
        self.worker = PacedWorker(self.inner, RATE, self.clock)

    def store(self, num_bytes: int) -> None:
        assert self.worker.submit_store(num_bytes, GPU, HOST)

    def load(self, num_bytes: int) -> None:
        assert self.worker.submit_load(num_bytes, HOST, GPU)

    def after(self, seconds: float) -> list[int]:
        """What is said to be done so much later."""
        self.clock.advance(seconds)
        return [result.job_id for result in self.worker.get_finished()]


def test_a_job_is_done_when_its_bytes_have_had_their_time() -> None:
    link = Link()
    link.load(50)
    assert link.after(0.0) == []
    assert link.after(0.49) == []
    assert link.after(0.02) == [50]
    assert link.after(9.0) == []


def test_jobs_of_one_direction_go_one_after_the_other() -> None:
    link = Link()
    link.load(50)
    link.load(30)
    assert link.after(0.51) == [50]
    assert link.after(0.28) == []
    assert link.after(0.02) == [30]


def test_directions_do_not_wait_for_each_other() -> None:
    link = Link()
    link.load(100)
    link.store(40)
    assert link.after(0.41) == [40]
    assert link.after(0.6) == [100]


def test_a_link_that_was_idle_owes_nobody_anything() -> None:
    link = Link()
    link.load(10)
    assert link.after(100.0) == [10]
    link.load(50)
    assert link.after(0.0) == []
    assert link.after(0.51) == [50]


def test_time_counts_from_submission_not_from_when_somebody_looks() -> None:
    link = Link()
    link.load(50)
    assert link.after(0.6) == [50]


def test_what_a_job_took_is_its_own_time_without_the_queue() -> None:
    link = Link()
    link.load(50)
    link.load(30)
    link.clock.advance(10.0)
    found = link.worker.get_finished()
    assert [(r.transfer_size, r.transfer_time, r.success) for r in found] == [(50, 0.5, True), (30, 0.3, True)]


def test_waiting_for_bytes_is_the_real_workers_and_so_is_the_end() -> None:
    link = Link()
    link.store(50)
    link.worker.wait({50})
    link.worker.shutdown()
    assert link.inner.waited_for == [{50}]
    assert link.inner.is_shut_down
    assert link.after(0.0) == [], "a flush must not make it done before its time"


def test_a_job_without_bytes_is_done_at_once() -> None:
    link = Link()
    link.load(0)
    assert link.after(0.0) == [0]
