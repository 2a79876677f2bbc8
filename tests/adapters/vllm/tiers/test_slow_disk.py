"""A disk that answers, but slowly, holds no turn for longer than is told, and policy survives it."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import OffloadKey, ReqContext, ScheduleEndContext, make_offload_key

from impala_vllm.adapters.vllm.tiers.manager import TierManager
from impala_vllm.adapters.vllm.tiers.nvme import LATE_FACTOR, LATE_S, LATEST_S, NvmeTier
from impala_vllm.adapters.vllm.tiers.policy import MAX_CHOSEN, TierPolicy
from impala_vllm.core.admission import Admission, Asking
from impala_vllm.core.cost import StepCost
from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.idle import IdleKv
from impala_vllm.core.planner import PlannerConfig
from impala_vllm.core.rank import Waiting
from impala_vllm.core.retention import Retention
from impala_vllm.core.types import RequestId, TraceId
from impala_vllm.transfer.limits import Limits
from tests.adapters.vllm.tiers.moving_bytes import CHUNK_BYTES, Disk, Host, content
from tests.transfer.virtual import ManualClock

BLOCK_TOKENS, CHUNK_TOKENS = 16, 32
SLOW_S = 150.0
"""A job of the disk's."""


def keys(name: str, number: int) -> list[OffloadKey]:
    return [make_offload_key(f"{name}{i:04}".encode(), 0) for i in range(number)]


class Server:
    """Waiting turns under policy, over a slab that a restart found filled."""

    def __init__(self, *chains: list[OffloadKey], host: int = 64, prior: float = 1e9, cap: float | None = None) -> None:
        self.clock = ManualClock()
        held = [key for chain in chains for key in chain]
        self.disk = Disk(len(held), self.clock, SLOW_S)
        self.disk.slots = [(key, content(key)) for key in held]
        self.disk.limits = Limits(read_bytes_per_s=cap)
        store: Any = self.disk
        memory = Host(host)
        self.nvme = NvmeTier(store, len(held), {k: i for i, k in enumerate(held)}, memory.row, CHUNK_BYTES)
        self.manager = TierManager(host, CHUNK_BYTES, CHUNK_TOKENS, self.nvme, self.clock)
        scheduler: Any = SimpleNamespace(
            block_size=BLOCK_TOKENS,
            hash_block_size=BLOCK_TOKENS,
            running=[],
            kv_cache_config=SimpleNamespace(prefix_cacheable_group_ids=[0]),
            kv_cache_manager=SimpleNamespace(block_pool=SimpleNamespace(get_num_free_blocks=lambda: 10_000)),
            vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(world_size=1), lora_config=None),
        )
        cost = StepCost()
        # Loads are what is tested, not whether they pay.
        self.policy = TierPolicy(scheduler, self.manager, cost, PlannerConfig(False, False, nvme_bytes_per_s=prior))
        self.link = self.policy.planner.nvme
        idle = IdleKv(GapForecast(), Admission(cost, 300.0), Retention(cost), self.policy.planner)
        self.manager.attach(idle, self.policy.planner)
        self.waiting: dict[str, list[OffloadKey]] = {}

    def arrive(self, req_id: str, prompt: list[OffloadKey]) -> None:
        self.waiting[req_id] = prompt
        self.manager.arrive(req_id, TraceId(req_id), prompt, 0, False)

    def step(self, seconds: float = 0.0) -> list[str]:
        """Time passes and a step is planned. Returns the turns that may run."""
        self.clock.advance(seconds)
        asks = [
            Asking(Waiting(RequestId(r), TraceId(r), 0.0, len(p) * CHUNK_TOKENS + 1, 0, 1.0), 1, 0)
            for r, p in self.waiting.items()
        ]
        ready = [ask.turn.request_id for ask in self.policy.load(asks, self.clock())]
        self.manager.on_schedule_end(ScheduleEndContext((), ()))
        return ready

    def abort(self, req_id: str) -> None:
        del self.waiting[req_id]
        self.manager.finish(req_id, self.manager.turns.open(req_id).keys, 0, False)
        self.manager.on_request_finished(ReqContext(req_id))


def test_a_turn_behind_a_read_that_is_overdue_computes() -> None:
    a, b = keys("a", 30), keys("b", 30)
    server = Server(a, b, prior=60.0)  # 8 s, as far as is known
    server.arrive("a", a)
    assert server.step() == []
    server.arrive("b", b)
    while server.clock() < 1000.0 + LATE_FACTOR * 8.0:
        assert server.step(1.0) == []
    server.disk.cancel = lambda job_id: False  # type: ignore[method-assign]  # it does not even let go of what it has not begun
    assert server.nvme.queued_s() > 0.5
    assert server.step(1.0) == ["a", "b"]


def test_a_read_that_is_overdue_is_called_back_and_what_it_brought_is_used() -> None:
    a = keys("a", 30)
    server = Server(a, prior=60.0)
    server.arrive("a", a)
    server.step()
    server.step(LATE_FACTOR * 8.0 + 1.0)
    assert server.disk.num_cancelled == 1
    server.step()
    assert server.disk.num_jobs == 0
    assert [key for key in a if key in server.manager.host.pool.ready] == a[: int(30 * 33 / SLOW_S)]
    assert server.link.queued_bytes == 0
    for _ in range(3):
        assert server.step(1.0) == ["a"], "nor is it asked for again"
    assert server.disk.num_jobs == 0
    assert set(a) == set(server.nvme.here), "nothing of it is lost"


def test_nobody_waits_for_a_disk_that_is_left_alone() -> None:
    chains = [keys(f"{i}-", 3) for i in range(MAX_CHOSEN + 4)]
    server = Server(*chains)
    for number, prompt in enumerate(chains):
        server.arrive(f"r{number}", prompt)
        asked: Any = SimpleNamespace(request_id=f"r{number}", num_tokens=3 * CHUNK_TOKENS + 1)
        server.policy.reach(asked, 0)
    assert server.step() == []
    assert server.disk.num_jobs == len(chains)
    server.disk.is_open = True
    assert len(server.step()) == len(chains)
    assert not server.policy.is_loading(server.clock())


def test_no_read_is_waited_for_longer_than_any_turn_is_held() -> None:
    a = keys("a", 30)
    server = Server(a, prior=1.0)
    server.arrive("a", a)
    server.disk._seconds = 1e6
    server.step()
    assert server.step(LATEST_S - 1.0) == []
    assert server.step(2.0) == ["a"]


def test_what_is_queued_and_how_fast_it_comes_is_known_before_a_job_is_over() -> None:
    a = keys("a", 30)
    server = Server(a, prior=10.0)
    server.arrive("a", a)
    server.disk.read_bytes_per_s = 3.2
    server.step()
    server.step(SLOW_S / 2)
    assert (server.link.queued_bytes, server.link.bytes_per_s) == (15 * CHUNK_BYTES, 3.2)


@pytest.mark.parametrize(("cap", "expected"), [(None, 1e9), (5e7, 5e7), (1e10, 1e9)])
def test_a_link_is_expected_to_be_no_faster_than_its_cap(cap: float | None, expected: float) -> None:
    assert Server(keys("a", 1), cap=cap).link.bytes_per_s == expected


def test_what_was_read_for_an_aborted_turn_is_called_back_and_others_go_on() -> None:
    a, b = keys("a", 30), keys("b", 30)
    server = Server(a, b)
    for name, prompt in (("a", a), ("b", b)):
        server.arrive(name, prompt)
    server.step()
    assert server.disk.num_jobs == 2
    server.abort("a")
    assert server.disk.num_cancelled == 1
    server.step(LATE_S / 2)
    assert server.disk.num_jobs == 1
    assert server.nvme.is_reading(b[0])
    assert not server.nvme.is_reading(a[0])


def test_what_another_turn_waits_for_too_is_not_called_back() -> None:
    a = keys("a", 30)
    server = Server(a)
    for name in ("a", "a2"):
        server.arrive(name, a)
        server.step()
    server.abort("a")
    assert server.disk.num_cancelled == 0
    server.abort("a2")
    assert server.disk.num_cancelled == 1
