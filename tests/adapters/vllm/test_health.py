"""One word for a server's state."""

from impala_vllm.adapters.vllm.health import Status, judge
from impala_vllm.adapters.vllm.heartbeat import Heartbeat
from impala_vllm.config import HealthConfig
from tests.adapters.vllm.fakes import snapshot

CONFIG = HealthConfig(stalled_after_s=60.0)


def status(*snapshots, silent_s=0.0, is_dead=False):
    return judge(list(snapshots), silent_s, is_dead, CONFIG).status


def test_nothing_to_do_is_idle_and_work_is_ok():
    assert status(snapshot()) is Status.IDLE
    assert status(snapshot(unfinished=2, stuck_s=5.0)) is Status.OK
    assert status(snapshot(), snapshot(rank=1, unfinished=1)) is Status.OK


def test_work_without_progress_is_a_stall():
    found = judge([snapshot(unfinished=2, stuck_s=61.0)], 0.0, False, CONFIG)
    assert found.status is Status.STALLED
    assert found.reasons == ["rank 0: 2 requests, no progress for 61 s"]


def test_requests_that_wait_for_their_clients_next_input_are_no_stall():
    assert status(snapshot(unfinished=0, stuck_s=300.0)) is Status.IDLE


def test_the_worst_rank_decides():
    assert status(snapshot(unfinished=1, stuck_s=99.0), snapshot(rank=1, unfinished=1)) is Status.STALLED


def test_silence_degrades_first_and_stalls_later():
    assert judge(None, 3.0, False, CONFIG).status is Status.DEGRADED
    assert judge(None, 61.0, False, CONFIG).status is Status.STALLED


def test_identity_switched_off_degrades_with_the_reason():
    found = judge([snapshot(identity={"on": False, "error": "ValueError: x"})], 0.0, False, CONFIG)
    assert found.status is Status.DEGRADED
    assert "ValueError: x" in found.reasons[0]


def test_an_nvme_tier_out_of_use_degrades_and_none_at_all_does_not():
    def policy(**tiers):
        return {"on": True, "held": 0, "tiers": tiers or None}

    found = judge([snapshot(policy=policy(nvme_usable=0.0))], 0.0, False, CONFIG)
    assert found.status is Status.DEGRADED
    assert "NVMe" in found.reasons[0]
    assert status(snapshot(policy=policy(nvme_usable=1.0))) is Status.IDLE
    assert status(snapshot(policy=policy(host_used_bytes=5.0))) is Status.IDLE
    assert status(snapshot(policy=policy())) is Status.IDLE


def test_a_dead_engine_is_a_stall():
    assert status(is_dead=True) is Status.STALLED


def test_paused_or_unwatched_degrades():
    assert status(snapshot(paused=True)) is Status.DEGRADED
    assert status({"rank": 0, "observed": False}) is Status.DEGRADED


def test_a_heartbeat_is_stuck_from_the_later_of_arrival_and_progress():
    beat = Heartbeat()
    assert beat.stuck_s(100.0) == 0.0
    beat.note_work(1, 100.0)
    assert beat.stuck_s(130.0) == 30.0
    beat.beat(5, 120.0)
    beat.beat(0, 129.0)  # a step that computed nothing is no progress
    assert beat.stuck_s(130.0) == 10.0
    beat.note_work(0, 131.0)
    assert beat.stuck_s(500.0) == 0.0
