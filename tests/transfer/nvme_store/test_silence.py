"""A disk that keeps silent, an engine that fails and a store that closes: nothing waits, nothing is lost."""

import threading
from pathlib import Path

import pytest

from impala_vllm.transfer.jobs import Result
from impala_vllm.transfer.slab import Slab, SlabError
from tests.transfer.finishing import LONG_S, finish
from tests.transfer.nvme_store.items import BUDGET_BYTES, SLOT_BYTES, data_of, key_of, to_read, to_write


def test_a_read_of_a_slow_disk_delays_nobody_and_can_be_given_up(gated):
    store, gate, clock = gated
    store.submit_read(1, to_read([0]))  # nothing there: failed without the disk
    assert finish(store)[1].failed_keys == (key_of(0),)
    gate.open_gate()
    store.submit_write(2, to_write(range(3)))
    finish(store)
    gate._is_open = False
    items = to_read(range(3))
    store.submit_read(3, items)
    assert gate.is_waiting.wait(LONG_S)
    assert not store.is_open
    clock.advance(5.0)
    assert store.is_open, "seen without the coordinator"
    assert not store.submit_write(4, to_write([5]))
    assert store.poll() == []
    gate.open_gate()
    assert len(finish(store)[3].done_keys) == 3
    assert all(item.buffer == data_of(item.slot) for item in items)


def test_reads_asked_of_an_open_breaker_come_back_untried(gated):
    store, gate, clock = gated
    gate.open_gate()
    store.submit_write(1, to_write(range(3)))
    finish(store)
    gate._is_open = False
    store.submit_read(2, to_read([0]))
    assert gate.is_waiting.wait(LONG_S)
    clock.advance(5.0)
    gate.wake()
    store.submit_read(3, to_read([1]))
    results: list[Result] = []
    while not results:
        results = store.poll()
    assert [(result.job_id, result.untried_keys) for result in results] == [(3, (key_of(1),))]
    gate.open_gate()


@pytest.mark.parametrize("error", [RuntimeError, SystemExit], ids=["it fails", "it only ends"])
def test_a_dead_coordinator_gives_everything_back_and_takes_nothing_more(
    gated, caplog: pytest.LogCaptureFixture, error: type[BaseException]
):
    store, gate, _ = gated
    most = store.limits.max_in_flight
    gate.open_gate()
    store.submit_write(1, to_write(range(most + 1)))
    finish(store)
    gate._is_open = False
    store.submit_read(2, to_read(range(most)))  # as many as may be under way
    store.submit_read(3, to_read([most]))
    store.submit_write(4, to_write(range(30, 35)))
    assert gate.is_waiting.wait(LONG_S)
    gate.fails_with = error
    gate.wake()
    store._thread.join(LONG_S)
    results = {result.job_id: result for result in store.poll()}
    assert set(results) == {2, 3, 4}
    assert all(result.done_keys == () for result in results.values())
    assert len(results[2].failed_keys) == most
    assert len(results[3].untried_keys) == 1
    assert store.is_open
    assert "switched off" in caplog.text
    assert not store.submit_write(5, to_write([1]))
    store.submit_read(6, to_read([1]))
    assert [result.untried_keys for result in store.poll()] == [(key_of(1),)]
    assert not store.cancel(6)
    store.forget([1])
    store.clear()
    store.close()


def test_what_the_disk_may_still_write_into_is_not_given_back_when_the_engine_cannot_be_closed(
    gated, monkeypatch: pytest.MonkeyPatch
):
    store, gate, clock = gated
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    store.submit_write(1, to_write(range(4)))  # as many as may be at the disk
    store.submit_write(2, to_write([5]))
    assert gate.is_waiting.wait(LONG_S)
    close = gate.close

    def fail_to_close() -> None:
        raise RuntimeError("cannot close")

    gate.close = fail_to_close
    gate.fails_with = RuntimeError
    gate.wake()
    store._thread.join(LONG_S)
    assert [result.job_id for result in store.poll()] == [2]
    clock.advance(5.0)
    assert store.is_open
    close()


def test_close_is_idempotent_gives_results_and_lets_the_next_one_in(make, tmp_path: Path):
    store = make()
    store.submit_write(1, to_write(range(10)))
    store.submit_read(2, to_read([0]))
    with pytest.raises(SlabError):
        Slab.open(tmp_path / "tier", BUDGET_BYTES, SLOT_BYTES, "a", wait_s=0.0)
    store.close()
    store.close()
    results = {result.job_id: result for result in store.poll()}
    assert results.keys() == {1, 2}
    num_done = len(results[1].done_keys)
    assert not store.submit_write(3, to_write([1]))
    store.submit_read(4, to_read([1]))
    assert [result.job_id for result in store.poll()] == [4]
    store = make()
    assert len(store._slab.recovered) == num_done


def test_closing_does_not_wait_for_ever_for_a_disk_that_hangs(gated, caplog: pytest.LogCaptureFixture):
    store, gate, _ = gated
    store.submit_write(1, to_write([1]))
    assert gate.is_waiting.wait(LONG_S)
    store.close(timeout_s=0.05)
    assert "does not answer" in caplog.text
    assert store.poll() == []
    gate.open_gate()
    store.close()
    assert [result.job_id for result in store.poll()] == [1]


def test_its_thread_is_a_named_daemon_and_gone_after_close(make):
    store = make()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "impala-nvme"]
    assert thread.daemon
    store.close()
    assert not thread.is_alive()
