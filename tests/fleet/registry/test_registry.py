"""Two routers' registries over a real Redis: leases, restarts of either side, missed changes, how busy servers are."""

import asyncio
from dataclasses import replace
from itertools import pairwise

import pytest

from impala_vllm.fleet.places import BlockKey, Replica, ServerId, Tier
from impala_vllm.fleet.registry import Registry, RegistryConfig, RegistryError, SharedIndex, readings, telling
from impala_vllm.fleet.registry import layout as layouts
from impala_vllm.fleet.registry.source import Source
from impala_vllm.fleet.scoring import Elsewhere, Load
from tests.fleet.cable import Cable
from tests.fleet.registry.serving import RedisServer

A, B = Replica(ServerId("http://a")), Replica(ServerId("http://b"))
CONFIG = RegistryConfig(claim_s=100.0, lease_s=600.0, believed_s=10.0, within_s=60.0)


class Site:
    """Routers that share a Redis, a clock that is advanced."""

    def __init__(self, redis: RedisServer) -> None:
        self.redis = redis
        self.config = CONFIG
        self.now_s = 0.0
        self.sides: list[Side] = []

    def router(self, a: bool | None = None, url: str | None = None) -> "Side":
        """`a`: it hears A itself, or only knows of it. `url`: its own way to Redis."""
        side = Side(self, {} if a is None else {A: Source("space", "life", a)}, url or self.redis.url)
        self.sides.append(side)
        return side

    async def meet(self, *sides: "Side", rounds: int = 2) -> None:
        """All look at Redis, again once what the first look changed is there."""
        for _ in range(rounds):
            for side in sides or self.sides:
                await side.registry.beat()


class Side:
    """One router's."""

    def __init__(self, site: Site, sources: dict[Replica, Source], url: str) -> None:
        self.index = SharedIndex()
        self.loads = {A: Load(), B: Load()}
        self.sources = sources
        self.registry = Registry(url, self.index, lambda: self.sources, self.loads, site.config, lambda: site.now_s)

    def keys(self, upto: int = 500) -> set[int]:
        return {k for k in range(1, upto) if self.index.holds(A, BlockKey(k))}


@pytest.fixture
async def site(tmp_path):
    redis = RedisServer(tmp_path)
    found = Site(redis)
    yield found
    redis.kill()
    for side in found.sides:
        await side.registry.leave()


def blocks(*numbers: int) -> list[BlockKey]:
    return [BlockKey(n) for n in numbers]


async def test_a_router_that_cannot_hear_reads_of_one_that_can(site):
    hears, reads = site.router(a=True), site.router(a=False)
    hears.index.store(A, Tier.HBM, blocks(*range(1, 5001)), 0.0)
    await site.meet()
    assert reads.index.stats()[:2] == (5000, 5000)
    hears.index.remove(A, Tier.HBM, blocks(*range(101, 5001)))
    hears.index.store(A, Tier.HOST, blocks(100, 101), 0.0)
    await site.meet()
    assert reads.keys() == set(range(1, 102))
    assert reads.index.holds(A, BlockKey(100)) == {Tier.HBM, Tier.HOST}
    hears.index.clear(A)
    hears.index.store(A, Tier.HBM, blocks(7), 0.0)
    await site.meet()
    assert reads.keys() == {7}
    reads.index.local.check_invariants()


async def test_one_tells_and_when_it_leaves_another_does(site):
    first, second, reads = site.router(a=True), site.router(a=True), site.router(a=False)
    for side in (first, second):
        side.index.store(A, Tier.HBM, blocks(1, 2), 0.0)
    await site.meet()
    assert reads.keys() == {1, 2}
    assert (first.registry.num_told, second.registry.num_told) == (1, 0)
    await first.registry.leave()
    site.now_s += 200.0
    second.index.remove(A, Tier.HBM, blocks(1))
    await site.meet(second, reads)
    assert second.registry.num_told == 1
    assert reads.keys() == {2}


async def test_a_lease_that_ran_out_is_anothers(site):
    dies, lives, reads = site.router(a=True), site.router(a=True), site.router(a=False)
    dies.index.store(A, Tier.HBM, blocks(1), 0.0)
    await site.meet(dies, reads)
    lives.index.store(A, Tier.HBM, blocks(1, 2), 0.0)
    client = dies.registry._client
    assert 0 < await client.pttl(layouts.place("space", A, "life").owner) <= 600_000
    await client.delete(layouts.place("space", A, "life").owner)
    site.now_s += 200.0
    await site.meet(lives, reads)
    assert reads.keys() == {1, 2}
    await site.meet(dies)  # it was only slow: it tells no longer
    assert (dies.registry.num_told, lives.registry.num_told) == (0, 1)


@pytest.fixture
def begun(monkeypatch) -> list[str]:
    """Places, one for each time that telling of one began."""
    places: list[str] = []
    begin = layouts.begin

    async def noted(client, where, before):
        places.append(where.base)
        await begin(client, where, before)

    monkeypatch.setattr(layouts, "begin", noted)
    return places


async def test_a_lease_shorter_than_one_telling_does_not_begin_it_again(site, monkeypatch, begun):
    """A millisecond: it has run out before each look at it, and nobody else has taken it."""
    monkeypatch.setattr(telling, "BLOCKS_A_BEAT", 100)
    site.config = replace(CONFIG, claim_s=0.0, lease_s=0.001)
    hears, reads = site.router(a=True), site.router(a=False)
    hears.index.store(A, Tier.HBM, blocks(*range(1, 5001)), 0.0)
    await site.meet(hears, rounds=80)
    assert len(begun) == 1
    await hears.registry._client.set(layouts.place("space", A, "life").owner, "somebody")  # readers look for one
    await site.meet(reads)
    assert reads.index.stats()[:2] == (5000, 5000)


async def test_a_long_telling_is_spread_over_beats_that_renew_its_lease(site, monkeypatch, begun):
    """And two routers that hear do not take it from one another."""
    monkeypatch.setattr(telling, "BLOCKS_A_BEAT", 100)
    site.config = replace(CONFIG, claim_s=1.0)
    first, second, reads = site.router(a=True), site.router(a=True), site.router(a=False)
    client, owner = first.registry._client, layouts.place("space", A, "life").owner
    for side in (first, second):
        side.index.store(A, Tier.HBM, blocks(*range(1, 2001)), 0.0)
    num_beats = 0
    while not await client.exists(layouts.place("space", A, "life").head):
        await client.pexpire(owner, 60_000)
        site.now_s += 1.0
        await site.meet(first, second, rounds=1)
        assert await client.pttl(owner) > 500_000
        first.index.remove(A, Tier.HBM, blocks(num_beats := num_beats + 1))
        assert num_beats < 100
    assert num_beats > 10
    await site.meet(first, reads)
    assert reads.index.stats().num_blocks == 2000 - num_beats
    assert len(begun) == 1


async def test_a_telling_gives_way_after_every_so_many_blocks(site, monkeypatch):
    written: list[int] = []
    fill = layouts.fill

    async def noted(client, where, generation, held):
        written.append(len(held))
        await fill(client, where, generation, held)

    monkeypatch.setattr(layouts, "fill", noted)
    hears = site.router(a=True)
    hears.index.store(A, Tier.HBM, blocks(*range(64, 64 * 5001, 64)), 0.0)  # all in one portion of the index
    await site.meet(hears)
    assert sum(written) == 5000
    assert max(written) <= 2000


async def test_what_another_told_meanwhile_is_told_anew_by_who_has_the_lease(site, begun):
    hears, reads = site.router(a=True), site.router(a=False)
    hears.index.store(A, Tier.HBM, blocks(1, 2), 0.0)
    await site.meet()
    client, where = hears.registry._client, layouts.place("space", A, "life")
    await layouts.begin(client, where, None)  # by a router whose lease ran out before it had begun
    await layouts.finish(client, where, "stray")
    site.now_s += 200.0
    await site.meet()
    assert reads.keys() == {1, 2}
    assert len(begun) == 3  # ours, the stray one, ours again
    assert len([key async for key in client.scan_iter("*:blocks:*")]) == 1


async def test_nothing_is_left_for_ever_by_a_router_that_dies(site, monkeypatch):
    """Whenever that is: while it tells, right after that, with its first change."""
    monkeypatch.setattr(telling, "BLOCKS_A_BEAT", 100)
    dies = site.router(a=True)
    client, num_keys = dies.registry._client, 0

    async def all_end() -> int:
        await site.meet(dies, rounds=1)
        keys = [key async for key in client.scan_iter("*")]
        assert all([await client.pttl(key) > 0 for key in keys])
        return len(keys)

    assert await all_end() == 4  # owner, head, changes, and how busy servers are
    dies.index.store(A, Tier.HBM, blocks(7), 0.0)
    assert await all_end() == 5
    dies.index.clear(A)
    dies.index.store(A, Tier.HBM, blocks(*range(1, 2001)), 0.0)
    for _ in range(30):
        num_keys = await all_end()
    assert num_keys == 5


async def test_a_telling_that_begins_again_leaves_one_generation(site):
    hears, next_one = site.router(a=True), site.router(a=True)
    for side in (hears, next_one):
        side.index.store(A, Tier.HBM, blocks(1, 2), 0.0)
    await site.meet(hears)
    await hears.registry.leave()
    await site.meet(next_one)
    client = next_one.registry._client
    assert len([key async for key in client.scan_iter("*:blocks:*")]) == 1


async def test_its_own_word_replaces_what_others_told(site):
    hears, reads = site.router(a=True), site.router(a=False)
    hears.index.store(A, Tier.HBM, blocks(1, 2), 0.0)
    await site.meet()
    assert reads.keys() == {1, 2}
    reads.sources[A] = Source("space", "life", True)
    reads.index.store(A, Tier.HBM, blocks(2, 3), 0.0)
    assert reads.keys() == {2, 3}
    reads.index.remove(A, Tier.HBM, blocks(2))
    hears.index.store(A, Tier.HBM, blocks(9), 0.0)
    await site.meet()
    assert reads.keys() == {3}


async def test_what_is_read_comes_in_portions_and_its_own_word_ends_that(site, monkeypatch):
    monkeypatch.setattr(readings, "BLOCKS_AT_ONCE", 100)
    hears, reads = site.router(a=True), site.router(a=False)
    hears.index.store(A, Tier.HBM, blocks(*range(1, 5001)), 0.0)
    await site.meet(hears)
    reading = asyncio.create_task(site.meet(reads))
    async with asyncio.timeout(100):
        while not reads.index.stats().num_blocks:
            await asyncio.sleep(0)
    assert reads.index.stats().num_blocks < 5000  # others have their turn meanwhile
    reads.sources[A] = Source("space", "life", True)
    reads.index.store(A, Tier.HBM, blocks(7), 0.0)
    await reading
    assert reads.index.stats().num_blocks == 1
    assert reads.keys() == {7}


async def test_many_that_are_read_whole_are_spread_over_beats(site, monkeypatch):
    monkeypatch.setattr(readings, "BLOCKS_A_BEAT", 1)
    hears, reads = site.router(a=True), site.router(a=False)
    hears.sources[B], reads.sources[B] = hears.sources[A], reads.sources[A]
    for replica in (A, B):
        hears.index.store(replica, Tier.HBM, blocks(1, 2), 0.0)
    await site.meet(hears)
    for num_heard in (1, 2, 2):
        await site.meet(reads, rounds=1)
        assert len(reads.index.heard) == num_heard
    hears.index.store(B, Tier.HBM, blocks(3), 0.0)
    await site.meet(rounds=1)
    assert reads.index.holds(B, BlockKey(3))


async def test_a_large_one_is_read_over_many_beats_and_what_changes_meanwhile_is_too(site, monkeypatch):
    monkeypatch.setattr(layouts, "BLOCKS_A_WRITE", 100)
    monkeypatch.setattr(readings, "BLOCKS_A_BEAT", 100)
    hears, reads = site.router(a=True), site.router(a=False)
    hears.index.store(A, Tier.HBM, blocks(*range(1, 2001)), 0.0)
    await site.meet(hears)
    num_read = [0]
    while num_read[-1] < 1600 and len(num_read) < 100:
        await site.meet(reads, rounds=1)
        num_read.append(reads.index.stats().num_blocks)
        hears.index.remove(A, Tier.HBM, blocks(len(num_read)))
        hears.index.store(A, Tier.HBM, blocks(2000 + len(num_read)), 0.0)
        await site.meet(hears, rounds=1)
    assert 10 < len(num_read) < 100
    assert max(after - before for before, after in pairwise(num_read)) < 400
    await site.meet(rounds=10)
    assert reads.index.stats().num_blocks == 2000
    assert reads.keys(3000) == hears.keys(3000)


async def test_one_that_begins_anew_while_it_is_read_is_read_anew(site, monkeypatch):
    monkeypatch.setattr(layouts, "BLOCKS_A_WRITE", 100)
    monkeypatch.setattr(readings, "BLOCKS_A_BEAT", 100)
    hears, reads = site.router(a=True), site.router(a=False)
    hears.index.store(A, Tier.HBM, blocks(*range(1, 2001)), 0.0)
    await site.meet(hears)
    await site.meet(reads)
    assert 0 < reads.index.stats().num_blocks < 2000
    hears.index.clear(A)
    hears.index.store(A, Tier.HBM, blocks(*range(2001, 2101)), 0.0)
    await site.meet(rounds=5)
    assert reads.keys(3000) == set(range(2001, 2101))


@pytest.mark.parametrize("step", ["look", "read"])
async def test_what_it_hears_itself_while_it_reads_stays(site, monkeypatch, step):
    hears, reads = site.router(a=True), site.router(a=False)
    hears.index.store(A, Tier.HBM, blocks(1, 2), 0.0)
    read = getattr(layouts, step)

    async def read_and_hear(*asked):
        found = await read(*asked)
        reads.sources[A] = Source("space", "life", True)
        reads.index.store(A, Tier.HBM, blocks(7), 0.0)
        return found

    monkeypatch.setattr(layouts, step, read_and_hear)
    await site.meet()
    assert reads.keys() == {7}
    assert not reads.index.heard


async def test_after_a_restart_of_redis_everything_is_told_again(site):
    hears, reads = site.router(a=True), site.router(a=False)
    hears.index.store(A, Tier.HBM, blocks(1, 2), 0.0)
    await site.meet()
    site.redis.kill()
    await site.meet()
    assert hears.registry.problem is not None
    assert reads.registry.num_failures > 0
    assert reads.keys() == {1, 2}  # for a little while
    site.now_s += 20.0
    await site.meet()
    assert not reads.keys()
    hears.index.remove(A, Tier.HBM, blocks(2))
    hears.index.store(A, Tier.HBM, blocks(3), 0.0)
    assert hears.keys() == {1, 3}  # its own view goes on
    site.redis.start()
    await site.meet()
    assert reads.keys() == {1, 3}
    assert hears.registry.problem is reads.registry.problem is None


async def test_a_redis_that_says_nothing_costs_no_decision_and_is_caught_up_with(site):
    site.config = replace(CONFIG, within_s=0.5)
    hears, reads = site.router(a=True), site.router(a=False)
    hears.index.store(A, Tier.HBM, blocks(1, 2), 0.0)
    async with asyncio.timeout(100):
        while reads.keys() != {1, 2}:
            await site.meet()
    site.redis.stop()
    hears.index.remove(A, Tier.HBM, blocks(1))
    hears.index.store(A, Tier.HBM, blocks(3), 0.0)
    await site.meet(rounds=1)
    assert hears.registry.problem is not None
    assert reads.registry.problem is not None
    assert hears.keys() == {2, 3}  # its own view
    assert reads.keys() == {1, 2}  # what it was told, for a while
    site.now_s += 20.0
    await site.meet(reads, rounds=1)
    assert not reads.keys()
    site.redis.go_on()
    async with asyncio.timeout(100):
        while reads.keys() != {2, 3}:
            await site.meet()
    assert hears.registry.problem is reads.registry.problem is None
    assert hears.registry.num_told == 1


async def test_a_router_that_was_cut_off_alone_tells_no_more_once_another_does(site):
    async with Cable(site.redis.socket) as cable:
        site.config = replace(CONFIG, within_s=0.5)
        parted = site.router(a=True, url=f"redis://127.0.0.1:{cable.port}/0")
        stays, reads = site.router(a=True), site.router(a=False)
        for side in (parted, stays):
            side.index.store(A, Tier.HBM, blocks(1), 0.0)
        async with asyncio.timeout(100):
            while reads.keys() != {1} or not parted.registry.num_told:
                await site.meet(parted, stays, reads)
        cable.cut()
        parted.index.store(A, Tier.HBM, blocks(66), 0.0)  # what it alone believes
        await site.meet(parted, rounds=1)
        assert parted.registry.problem is not None
        await stays.registry._client.delete(layouts.place("space", A, "life").owner)  # the lease has run out
        stays.index.store(A, Tier.HBM, blocks(2), 0.0)
        site.now_s += 200.0
        async with asyncio.timeout(100):
            while reads.keys() != {1, 2}:
                await site.meet(stays, reads)
        cable.mend(forgets=True)
        async with asyncio.timeout(100):
            while parted.registry.problem is not None:
                await site.meet(parted)
        await site.meet()
        assert (parted.registry.num_told, stays.registry.num_told) == (0, 1)
        assert reads.keys() == {1, 2}


async def test_a_redis_that_was_replaced_unnoticed_is_told_everything_too(site):
    hears, reads = site.router(a=True), site.router(a=False)
    hears.index.store(A, Tier.HBM, blocks(1, 2), 0.0)
    await site.meet()
    site.redis.kill()
    site.redis.start()
    for side in site.sides:
        await side.registry._client.connection_pool.disconnect()
    hears.index.store(A, Tier.HBM, blocks(3), 0.0)
    site.now_s += 200.0
    await site.meet(rounds=3)
    assert reads.keys() == {1, 2, 3}


async def test_a_reader_that_fell_behind_reads_everything_again(site, monkeypatch):
    monkeypatch.setattr(layouts, "MAX_CHANGES", 1)
    monkeypatch.setattr(layouts, "BLOCKS_A_WRITE", 1)
    hears, reads = site.router(a=True), site.router(a=False)
    hears.index.store(A, Tier.HBM, blocks(*range(1, 300)), 0.0)
    await site.meet()
    assert reads.keys() == set(range(1, 300))
    hears.index.remove(A, Tier.HBM, blocks(*range(1, 299)))
    await site.meet(rounds=1)
    assert reads.keys() == {299}


async def test_another_life_of_a_server_is_another_place(site):
    hears, reads = site.router(a=True), site.router(a=False)
    hears.index.store(A, Tier.HBM, blocks(1), 0.0)
    await site.meet()
    reads.sources[A] = Source("space", "second life", False)
    site.now_s += 200.0
    await site.meet()
    assert not reads.keys()
    hears.index.clear(A)
    hears.sources[A] = Source("space", "second life", True)
    hears.index.store(A, Tier.HBM, blocks(5), 0.0)
    site.now_s += 200.0
    await site.meet()
    assert reads.keys() == {5}


async def test_routers_that_hash_otherwise_never_meet(site):
    hears, reads, other = site.router(a=True), site.router(a=False), site.router()
    other.sources[A] = Source("another space", "life", False)
    hears.index.store(A, Tier.HBM, blocks(1), 0.0)
    await site.meet()
    assert reads.keys() == {1}
    assert not other.index.heard


async def test_what_others_keep_busy_counts_until_they_fall_silent(site):
    one, two = site.router(), site.router()
    one.loads[A].start(1.5)
    one.loads[A].start(0.5)
    one.loads[A].live_tokens, one.loads[A].num_traces = 700, 3
    await site.meet()
    assert two.loads[A].elsewhere == Elsewhere(2, 2.0, 700, 3)
    assert one.loads[A].elsewhere == two.loads[B].elsewhere == Elsewhere()
    site.now_s += 700.0
    await site.meet(two)
    assert two.loads[A].elsewhere == Elsewhere()


async def test_what_lies_there_and_is_not_ours_is_survived(site):
    hears, reads = site.router(a=True), site.router(a=False)
    hears.index.store(A, Tier.HBM, blocks(1), 0.0)
    await site.meet()
    client, place = hears.registry._client, layouts.place("space", A, "life")
    await client.xadd(place.changes, {"g": "poison", "n": 7, "b": b"xyz"})
    await client.hset("impala:1:loads", "nobody", b"\xff\x00")
    hears.index.store(A, Tier.HBM, blocks(2), 0.0)
    await site.meet()
    assert reads.keys() == {1, 2}
    await client.delete(place.changes)
    await client.set(place.changes, "not a stream")
    hears.index.store(A, Tier.HBM, blocks(3), 0.0)
    await site.meet(hears, rounds=1)
    assert hears.registry.problem is not None
    await client.delete(place.changes)
    await site.meet()
    assert reads.keys() == {1, 2, 3}


@pytest.mark.parametrize("url", ["cassandra://x", "host:6379", "redis://h:port"])
def test_what_is_no_registry_is_refused_in_a_line(url):
    pytest.importorskip("redis")
    with pytest.raises(RegistryError) as refused:
        Registry(url, SharedIndex(), dict, {})
    assert "\n" not in str(refused.value)
