"""Whose a tier's chunks are: examples one can follow by hand."""

from impala_vllm.core.chains import MAX_CHAINS
from impala_vllm.core.types import TraceId
from tests.core.tier import A, B, everything, held, keys, tier


def test_nobodys_chunks_may_be_touched_twice_in_one_go() -> None:
    chains = tier()
    chains.add(keys("x", 3))
    chains.touch([*keys("x", 3), *keys("x", 1)])
    assert everything(chains) == [b"x2", b"x1", b"x0"]


def test_touching_leaves_a_traces_chunks_alone() -> None:
    chains = tier()
    held(chains, (A, keys("a", 2)))
    chains.touch(keys("a", 2))
    assert chains.num_of(A) == 2


def test_what_a_turn_no_longer_uses_is_superseded_at_once() -> None:
    chains = tier(A)
    held(chains, (A, keys("a", 5)))
    chains.use(A, [*keys("a", 3), *keys("z", 2)])  # compacted behind the third chunk
    assert [chains.trace_of(key) for key in keys("a", 5)] == [A, A, A, None, None]
    assert chains.victims(2, list) == [b"a4", b"a3"]


def test_without_supersession_what_a_turn_no_longer_uses_stays_its_traces() -> None:
    chains = tier(A)
    chains.supersedes = False
    held(chains, (A, keys("a", 3)))
    chains.add(keys("n", 1))
    chains.use(A, [*keys("a", 1), *keys("z", 2)])
    chains.check_invariants()
    assert chains.num_of(A) == 3
    assert everything(chains) == [b"n0", b"a2", b"a1", b"a0"]


def test_a_turn_that_grows_keeps_all_of_its_chain() -> None:
    chains = tier(A)
    held(chains, (A, keys("a", 3)), (A, keys("a", 6)))
    assert chains.num_of(A) == 6
    assert everything(chains) == keys("a", 6)[::-1]


def test_a_turn_is_told_which_of_its_chunks_are_surely_here() -> None:
    chains = tier(A)
    chains.add(keys("s", 2))
    assert chains.use(A, [*keys("s", 2), *keys("a", 3)], stem=2) == range(0)
    chains.add(keys("a", 3), A)
    assert chains.use(A, [*keys("s", 2), *keys("a", 5)], stem=2) == range(2, 5)
    assert chains.use(A, keys("z", 5)) == range(0)


def test_a_root_that_comes_back_late_is_still_the_last_to_go() -> None:
    chains = tier(A)
    held(chains, (A, keys("a", 4)))
    chains.drop(keys("a", 2))
    chains.add(keys("a", 2))  # somebody without a name stored it again
    chains.use(A, keys("a", 4))
    assert everything(chains) == keys("a", 4)[::-1]


def test_a_chunk_that_two_traces_use_is_a_stem_and_goes_after_both() -> None:
    chains = tier(A, B)
    held(chains, (A, [*keys("s", 2), *keys("a", 1)]), (B, [*keys("s", 2), *keys("b", 1)]))
    assert [chains.trace_of(key) for key in keys("s", 2)] == [None, None]
    assert everything(chains) == [b"a0", b"b0", b"s1", b"s0"]
    chains.release(A)
    chains.release(B)
    assert everything(chains)[-2:] == [b"s1", b"s0"]


def test_a_stem_that_is_known_is_nobodys_from_the_first_turn_on() -> None:
    chains = tier(A)
    chains.add(keys("s", 2))
    chains.use(A, [*keys("s", 2), *keys("a", 1)], stem=2)
    assert chains.num_of(A) == 0
    assert everything(chains) == [b"s1", b"s0"]


def test_conversations_of_one_trace_are_told_apart() -> None:
    chains = tier(A)
    held(chains, (A, keys("a", 2)), (A, keys("x", 2)), (A, keys("a", 3)))
    assert chains.num_of(A) == 5
    # The one used last goes last.
    assert everything(chains) == [b"x1", b"x0", b"a2", b"a1", b"a0"]


def test_of_too_many_conversations_the_one_silent_longest_is_let_go() -> None:
    chains = tier(A)
    held(chains, *((A, keys(f"talk{i}-", 1)) for i in range(MAX_CHAINS + 1)))
    assert chains.trace_of(b"talk0-0") is None
    assert chains.num_of(A) == MAX_CHAINS
    assert b"talk0-0" in chains


def test_a_trace_that_is_over_leaves_its_chunks_to_nobody() -> None:
    chains = tier(A)
    held(chains, (A, keys("a", 2)), (B, keys("b", 2)))
    chains.release(A)
    chains.release(TraceId("never seen"))
    chains.check_invariants()
    assert chains.num_of(A) == 0
    assert chains.num_of(B) == 2
    chains.add(keys("stem", 2), A)
    chains.use(A, keys("stem", 2), stem=2)
    assert len(chains._stems) == 2
    chains.release_all()
    chains.check_invariants()
    assert chains.num_of(B) == 0
    assert len(chains) == 6
    assert not chains._stems


def test_lists_made_anew_are_not_taken_for_those_that_had_their_place_in_memory() -> None:
    chains = tier()
    for i in range(2000):
        trace_id = TraceId(str(i % 3))
        chains.use(trace_id, [f"{i}".encode()])
        chains.add([f"{i}".encode()], trace_id)
        assert chains.trace_of(f"{i}".encode()) == trace_id
        if i % 7 == 0:
            chains.release(trace_id)
            chains.check_invariants()
