"""What the simulator tells core of a queue over tiers: as much as the adapter tells it."""

from itertools import pairwise

from impala_vllm.sim.policies.impala import Impala
from impala_vllm.sim.policies.impala_tiers import ImpalaTiers
from impala_vllm.sim.tiers import Room
from tests.sim.scenes import Scene, session, workload

BELOW = Room(
    host_blocks=14,
    nvme_blocks=200,
    block_bytes=40,
    host_bytes_per_s=4000.0,
    nvme_read_bytes_per_s=400.0,
    nvme_write_bytes_per_s=400.0,
)


def test_a_waiting_turns_price_knows_who_computes_and_who_is_read_for(monkeypatch):
    seen = []
    choose = ImpalaTiers.choose

    def spying(self, requests, asks, num_running):
        made = choose(self, requests, asks, num_running)
        seen.append((num_running, [self._turns[r] for r in requests], [self._turns[r].queue for r in requests]))
        return made

    monkeypatch.setattr(ImpalaTiers, "choose", spying)
    load = workload(*(session(n, [30, 38, 46], output=3, gap_s=20.0) for n in "abcd"))
    scene = Scene(load, num_blocks=14, policy=Impala, below=BELOW).play()
    assert len(scene.client.served) == 12
    assert any(len(queues) > 1 for _, _, queues in seen)
    for num_running, turns, queues in seen:
        behind = [q.num_behind + q.num_reading_behind for q in queues]
        assert behind == [num_running + len(turns) - 1 - i for i in range(len(turns))]
        assert all(a.compute_s <= b.compute_s for a, b in pairwise(queues))


def test_what_is_on_its_way_from_nvme_is_remembered(monkeypatch):
    asked = []
    read_in = ImpalaTiers._is_ready

    def spying(self, turn, before):
        is_ready = read_in(self, turn, before)
        asked.append((turn.asked_blocks, bool(self._late_s)))
        return is_ready

    monkeypatch.setattr(ImpalaTiers, "_is_ready", spying)
    load = workload(*(session(n, [30, 38, 46], output=3, gap_s=20.0) for n in "abcd"))
    Scene(load, num_blocks=14, policy=Impala, below=BELOW).play()
    assert any(blocks > 0 and is_reading for blocks, is_reading in asked)
