"""Without policy the tiers are plain caches."""

from collections.abc import Sequence

import pytest

pytest.importorskip("vllm")


from impala_vllm.transfer.jobs import Item
from tests.adapters.vllm.tiers.whole import Tiers, keys, names


def test_a_plain_cache_keeps_what_was_used_last_and_evicts_a_prompt_from_its_tail() -> None:
    tiers = Tiers(8, policy=False)
    tiers.serve("r", keys("a", 4))
    tiers.serve("s", keys("b", 4))
    request = tiers.arrive("t", keys("a", 4))
    tiers.complete(request, tiers.load(request, 4))
    tiers.finish(request)
    tiers.serve("u", keys("c", 3))
    assert names(tiers.manager.host.pool.keys()) == [*names(keys("a", 4)), "b0000", *names(keys("c", 3))]


def test_a_plain_cache_of_several_groups_does_the_same() -> None:
    tiers = Tiers(8, policy=False)
    request = tiers.arrive("r", keys("a", 2, 0) + keys("a", 2, 1))
    for _ in range(2):
        tiers.compute(request, 2)
        tiers.settle(request)
    tiers.finish(request)
    tiers.serve("s", keys("b", 6))
    assert len(tiers.manager.host.pool) == 8
    tiers.check_nothing_moves()


def test_chunks_of_several_groups_lie_behind_one_of_the_place_before_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = Tiers(8, nvme=8, policy=False)
    (a0, a2), (b0,) = keys("a", 3, 0)[::2], keys("a", 1, 1)
    request = tiers.arrive("r", [a0, b0, a2])
    monkeypatch.setattr(tiers.manager, "_place", lambda _, key: {a0: 0, b0: 0}.get(key, 2))
    parents: dict[bytes, bytes | None] = {}
    submit = tiers.disk.submit_write

    def note(job_id: int, items: Sequence[Item]) -> bool:
        parents.update((item.key, item.parent) for item in items)
        return submit(job_id, items)

    monkeypatch.setattr(tiers.disk, "submit_write", note)
    tiers.compute(request, 3)  # places 0, 0 and 2: as many as to the last one, and yet not one behind the other
    tiers.settle(request)
    assert parents == {a0: None, b0: None, a2: None}


def test_a_plain_cache_writes_everything_through() -> None:
    tiers = Tiers(8, nvme=8, policy=False)
    request = tiers.arrive("r", keys("a", 4))
    for _ in range(4):
        tiers.compute(request, 1)
        tiers.settle(request)
    tiers.finish(request)
    tiers.step(1.0)
    assert tiers.nvme is not None
    assert len(tiers.nvme.pool) == 4


def test_a_plain_cache_serves_a_prompt_that_is_longer_than_host() -> None:
    tiers = Tiers(8, nvme=16, policy=False)
    tiers.has_policy = False
    prompt = keys("a", 12)
    for start in (0, 6):  # on NVMe as a whole, in two visits
        request = tiers.arrive(f"r{start}", prompt[start : start + 6])
        tiers.compute(request, 6)
        tiers.finish(request)
        tiers.settle(request)
        tiers.step(1.0)
        tiers.manager.host.evict([key for key in prompt if tiers.manager.host.pool.is_ready(key)])
    request = tiers.arrive("s", prompt)
    found = None
    for _ in range(20):
        found = tiers.lookup(request)
        if found is not None:
            break
        tiers.step(0.2)
    assert found == 8
    tiers.complete(request, tiers.load(request, 8))
    tiers.finish(request)
    tiers.step(1.0)
    tiers.check_nothing_moves()
