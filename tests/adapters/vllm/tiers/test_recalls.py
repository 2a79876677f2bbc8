"""When a recall starts, how much of it at once, and what is counted of it."""

from collections.abc import Sequence

from impala_vllm.adapters.vllm.tiers.recalls import EVERY_S, LIFE_MEMORY_S, PIECE_S, Recalls
from impala_vllm.core.allocator import Key, SlotPool
from impala_vllm.core.cost import StepCost
from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.planner import Planner, PlannerConfig
from impala_vllm.core.types import TraceId

A = TraceId("a")
CHUNK_BYTES, GAP_S = 1000, 20.0
PIECE = 4
"""Chunks that the disk reads in `PIECE_S`."""
CHAIN = [bytes([i]) for i in range(10)]


class Scene:
    """A trace that is silent from second 100 on, as long as all were before it; its KV is on NVMe."""

    def __init__(self, num_slots: int = 100) -> None:
        gaps = GapForecast()
        for i in range(300):
            gaps.finish(TraceId(f"t{i}"), 0.0)
            gaps.resume(TraceId(f"t{i}"), GAP_S)
        gaps.refresh(0.0)
        gaps.finish(A, 100.0)
        rate = PIECE * CHUNK_BYTES / PIECE_S
        self.planner = Planner(gaps, StepCost(), 1.0, PlannerConfig(nvme_bytes_per_s=rate))
        self.host = SlotPool(num_slots)
        self.reads: list[list[Key]] = []
        self.recalls = Recalls(self.host, CHUNK_BYTES, lambda _: CHAIN, lambda: CHAIN[:9], self.read)
        self.recalls.expect(A, self.planner, 100.0)

    def read(self, keys: Sequence[Key], trace_id: TraceId, now: float) -> bool:
        """At once."""
        self.reads.append(list(keys))
        assert self.host.reserve(keys) is not None
        self.host.commit(keys)
        self.recalls.came(keys)
        return True

    def run(self, start_s: float, end_s: float, is_wanted: bool = False) -> None:
        now = start_s
        while now < end_s:
            now += EVERY_S
            self.recalls.start(self.planner, now, is_wanted)


def test_a_recall_waits_for_its_time_and_comes_in_pieces_from_the_root_on() -> None:
    scene = Scene()
    scene.run(100.0, 105.0)
    assert scene.reads == []
    scene.run(105.0, 120.0)
    assert scene.reads == [CHAIN[:4], CHAIN[4:8], CHAIN[8:9]], "as far as NVMe has it"


def test_a_disk_that_turns_wait_for_recalls_nothing_until_they_have_what_they_want() -> None:
    scene = Scene()
    scene.run(100.0, 119.0, is_wanted=True)
    assert scene.reads == []
    scene.run(119.0, 119.5)
    assert scene.reads[0] == CHAIN[:4]


def test_a_disk_with_a_queue_is_left_alone() -> None:
    scene = Scene()
    scene.planner.nvme.queued_bytes = 2 * PIECE * CHUNK_BYTES
    scene.run(100.0, 119.0)
    assert scene.reads == []


def test_a_host_that_gives_everything_up_within_a_second_is_not_filled_with_bets() -> None:
    scene = Scene()
    now = 100.0
    while now < 100.0 + GAP_S:
        now += EVERY_S
        scene.recalls.left_host([b"other"] * int(100 * EVERY_S))
        scene.recalls.start(scene.planner, now, False)
    assert scene.reads == []


def test_evictions_of_long_ago_are_forgotten() -> None:
    scene = Scene()
    scene.recalls.left_host([b"other"] * 100)
    scene.run(100.0 - 5 * LIFE_MEMORY_S, 100.0)
    scene.run(100.0, 120.0)
    assert scene.reads


def test_what_is_used_is_not_wasted_and_what_leaves_unused_is() -> None:
    scene = Scene()
    scene.run(100.0, 120.0)
    scene.recalls.used(CHAIN[:3])
    scene.recalls.left_host(CHAIN[:5])
    scene.recalls.left_host(CHAIN[:5])
    assert (scene.recalls.num_recalled, scene.recalls.num_wasted) == (9, 2)
