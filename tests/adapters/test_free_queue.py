"""The eviction queue against a naive model, and against vLLM's own where nobody claims anything."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="needs vLLM: make setup")

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from impala_vllm.adapters.vllm.free_queue import FreeQueue
from impala_vllm.core.types import TraceId

TRACES = [TraceId(t) for t in "abc"]


def make(num_blocks: int, worth: dict[TraceId, int] | None = None) -> tuple[list[KVCacheBlock], FreeQueue]:
    blocks = [KVCacheBlock(block_id=i) for i in range(num_blocks)]
    order = worth or {}
    return blocks, FreeQueue(
        FreeKVCacheBlockQueue(blocks), lambda traces: sorted(traces, key=lambda t: order.get(t, 0))
    )


def put(queue: FreeQueue, trace: TraceId | None, blocks: list[KVCacheBlock], stems: int = 0) -> None:
    queue.claim, queue.stem_blocks = trace, frozenset(b.block_id for b in blocks[len(blocks) - stems :])
    queue.append_n(blocks)
    queue.claim, queue.stem_blocks = None, frozenset()
    queue.new_round()


def test_blocks_of_the_cheapest_chain_go_first_tail_before_root() -> None:
    blocks, queue = make(9, {TRACES[0]: 2, TRACES[1]: 1})
    taken = queue.popleft_n(9)
    put(queue, TRACES[0], taken[0:4])
    put(queue, TRACES[1], taken[4:8])
    put(queue, None, taken[8:])
    assert [b.block_id for b in queue.popleft_n(6)] == [8, 4, 5, 6, 7, 0]
    queue.check_invariants()
    del blocks


def test_shared_stems_go_last() -> None:
    _, queue = make(6, {TRACES[0]: 1, TRACES[1]: 2})
    taken = queue.popleft_n(6)
    put(queue, TRACES[0], taken[0:3], stems=2)
    put(queue, TRACES[1], taken[3:6])
    assert [b.block_id for b in queue.popleft_n(6)] == [0, 3, 4, 5, 1, 2]


def test_a_stem_stays_while_a_chain_is_left_that_may_go_on_from_it() -> None:
    _, queue = make(6, {TRACES[0]: 2, TRACES[1]: 1})
    taken = queue.popleft_n(6)
    put(queue, TRACES[0], taken[0:3], stems=2)
    put(queue, TRACES[1], taken[3:6])
    assert [queue.popleft().block_id for _ in range(6)] == [3, 4, 5, 0, 1, 2]


def test_a_stem_that_was_idle_before_every_chain_left_goes_before_them() -> None:
    _, queue = make(6, {TRACES[0]: 1, TRACES[1]: 2})
    taken = queue.popleft_n(6)
    put(queue, TRACES[0], taken[0:3], stems=2)
    put(queue, TRACES[1], taken[3:6])
    assert [queue.popleft().block_id for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    queue.check_invariants()


def test_a_stem_that_was_used_again_is_young_again() -> None:
    blocks, queue = make(6, {TRACES[0]: 1, TRACES[1]: 2})
    taken = queue.popleft_n(6)
    put(queue, TRACES[0], taken[0:3], stems=2)
    put(queue, TRACES[1], taken[3:5])
    queue.remove(blocks[2])
    put(queue, TRACES[1], [taken[5], blocks[2]], stems=1)
    assert [queue.popleft().block_id for _ in range(6)] == [0, 1, 3, 4, 5, 2]


def test_a_touched_block_leaves_its_chain() -> None:
    blocks, queue = make(4)
    taken = queue.popleft_n(4)
    put(queue, TRACES[0], taken)
    queue.remove(blocks[2])
    assert queue.claims() == {TRACES[0]: 3}
    assert [b.block_id for b in queue.get_all_free_blocks()] == [0, 1, 3]
    queue.check_invariants()


def test_a_released_chain_goes_before_every_claimed_one() -> None:
    _, queue = make(4, {TRACES[0]: 1, TRACES[1]: 2})
    taken = queue.popleft_n(4)
    put(queue, TRACES[0], taken[:2])
    put(queue, TRACES[1], taken[2:])
    queue.release(TRACES[1])
    assert [b.block_id for b in queue.popleft_n(3)] == [2, 3, 0]


def test_taking_more_than_there_is_fails_as_in_vllm() -> None:
    _, queue = make(0)
    with pytest.raises(ValueError, match="No free blocks"):
        queue.popleft()


@settings(max_examples=60)
@given(st.data())
def test_without_claims_the_order_is_stocks(data: st.DataObject) -> None:
    ours_blocks, ours = make(12)
    theirs_blocks = [KVCacheBlock(block_id=i) for i in range(12)]
    theirs = FreeKVCacheBlockQueue(theirs_blocks)
    out: list[int] = []
    for _ in range(data.draw(st.integers(1, 40))):
        verb = data.draw(st.sampled_from(["pop", "append", "prepend", "remove"]))
        if verb == "pop":
            count = data.draw(st.integers(0, ours.num_free_blocks))
            got = [b.block_id for b in ours.popleft_n(count)]
            assert got == [b.block_id for b in theirs.popleft_n(count)]
            out += got
        elif verb == "remove" and len(out) < 12:
            chosen = data.draw(st.sampled_from([i for i in range(12) if i not in out]))
            ours.remove(ours_blocks[chosen])
            theirs.remove(theirs_blocks[chosen])
            out.append(chosen)
        elif out:
            back = [out.pop() for _ in range(data.draw(st.integers(1, len(out))))]
            for queue, blocks in ((ours, ours_blocks), (theirs, theirs_blocks)):
                getattr(queue, f"{verb}_n" if verb != "remove" else "append_n")([blocks[i] for i in back])
        assert ours.num_free_blocks == theirs.num_free_blocks
        ours.check_invariants()
    assert [b.block_id for b in ours.get_all_free_blocks()] == [b.block_id for b in theirs.get_all_free_blocks()]


@settings(max_examples=60)
@given(st.data())
def test_no_block_is_lost_or_given_twice(data: st.DataObject) -> None:
    blocks, queue = make(16, dict(zip(TRACES, [3, 1, 2], strict=True)))
    out: set[int] = set()
    for _ in range(data.draw(st.integers(1, 50))):
        verb = data.draw(st.sampled_from(["pop", "put", "remove", "release"]))
        if verb == "pop":
            got = {b.block_id for b in queue.popleft_n(data.draw(st.integers(0, queue.num_free_blocks)))}
            assert not got & out
            out |= got
        elif verb == "put" and out:
            back = sorted(out)[: data.draw(st.integers(1, len(out)))]
            out -= set(back)
            trace = data.draw(st.sampled_from([None, *TRACES]))
            put(queue, trace, [blocks[i] for i in back], data.draw(st.integers(0, len(back))) if trace else 0)
        elif verb == "remove" and len(out) < 16:
            chosen = data.draw(st.sampled_from([i for i in range(16) if i not in out]))
            queue.remove(blocks[chosen])
            out.add(chosen)
        elif verb == "release":
            queue.release(data.draw(st.sampled_from(TRACES)))
        queue.check_invariants()
        assert queue.num_free_blocks == 16 - len(out)
