"""Who goes first in a tier: examples one can follow by hand."""

import pytest

from impala_vllm.core.chains import STEM_SHARE, Chains
from impala_vllm.core.types import TraceId
from impala_vllm.core.worth_order import ROUND
from tests.core.tier import LARGE, A, B, C, everything, held, keys, tier


def test_a_chain_goes_from_its_tail_to_its_root() -> None:
    chains = tier()
    held(chains, (A, keys("a", 4)))
    assert chains.victims(2, list) == [b"a3", b"a2"]
    assert everything(chains) == keys("a", 4)[::-1]


def test_the_trace_that_is_worth_least_goes_first_whatever_came_first() -> None:
    chains = tier(B, A)
    held(chains, (A, keys("a", 2)), (B, keys("b", 2)))
    assert everything(chains) == [b"b1", b"b0", b"a1", b"a0"]


def test_what_is_nobodys_goes_before_every_trace_and_tail_first() -> None:
    chains = tier(A)
    chains.add(keys("old", 2))
    chains.add(keys("new", 2))
    held(chains, (A, keys("a", 1)))
    assert everything(chains) == [b"old1", b"old0", b"new1", b"new0", b"a0"]


def test_nobodys_chunks_that_are_used_go_last_of_them_and_tail_first() -> None:
    chains = tier()
    chains.add(keys("x", 2))
    chains.add(keys("y", 2))
    chains.add(keys("x", 2, start=2))  # the same prompt, a step later
    chains.touch([*keys("x", 4), b"not here"])
    assert everything(chains) == [b"y1", b"y0", b"x3", b"x2", b"x1", b"x0"]


def test_stems_beyond_their_share_go_first_least_recently_used_and_tail_first() -> None:
    num_chunks = 12
    chains = tier(A, B, C, num_chunks=num_chunks)
    for trace_id, stem in ((A, "r"), (B, "s"), (A, "r")):
        chains.add([key for key in keys(stem, 4) if key not in chains])
        chains.use(trace_id, keys(stem, 4), stem=4)
    chains.add(keys("n", 1))
    surplus = 8 - int(STEM_SHARE * num_chunks)
    order = everything(chains)
    assert order[:surplus] == [b"s3", b"s2"]
    assert order[surplus:] == [b"n0", b"s1", b"s0", b"r3", b"r2", b"r1", b"r0"]


def test_only_what_is_worth_less_than_the_trace_itself_may_go_for_it() -> None:
    chains = tier(A, B, C)
    held(chains, (A, keys("a", 2)), (B, keys("b", 2)), (C, keys("c", 2)))
    chains.add(keys("n", 1))
    assert chains.victims(9, list, only_nobodys=True) == [b"n0"]
    assert chains.victims(9, list, only_cheaper_than=B) == [b"n0", b"a1", b"a0"]
    assert chains.victims(9, list, only_cheaper_than=A) == [b"n0"]
    nothing_here = TraceId("d")  # not named in the order: worth least
    assert chains.victims(9, list, only_cheaper_than=nothing_here) == [b"n0"]


def test_spared_traces_and_chunks_that_may_not_go_stay() -> None:
    chains = tier(A, B)
    held(chains, (A, keys("a", 2)), (B, keys("b", 3)))
    assert chains.victims(9, lambda some: [key for key in some if key != b"b2"], spared=(A,)) == [b"b1", b"b0"]


def test_chunks_of_traces_that_go_last_go_behind_all_others_but_before_stems() -> None:
    chains = tier(A, B, C)
    held(chains, (A, keys("a", 2)), (B, keys("b", 1)), (C, keys("c", 1)))
    chains.add(keys("s", 1))
    chains.use(C, [*keys("s", 1), *keys("c", 1)], 1)
    assert chains.victims(9, list, last={A, C}, spared=(C,)) == [b"b0", b"a1", b"a0", b"s0"]


def test_an_order_of_traces_is_good_for_a_round_but_for_those_whose_turns_come_or_go() -> None:
    asked: list[TraceId] = []
    worth = {A: 1.0, B: 2.0, C: 0.0}

    def ask(trace_id: TraceId) -> float:
        asked.append(trace_id)
        return worth[trace_id]

    chains = Chains(LARGE, ask)
    held(chains, (A, keys("a", 2)), (B, keys("b", ROUND + 1)))
    for _ in range(3):
        chains.drop(chains.victims(1, list))
    assert asked == [A, B]
    held(chains, (C, keys("c", 1)))
    assert chains.victims(1, list) == [b"c0"]
    assert asked == [A, B, C]
    worth[C] = 3.0
    chains.use(C, keys("c", 1))
    assert everything(chains)[-1] == b"c0"
    assert asked == [A, B, C, C]
    chains.release(A)
    assert everything(chains) == [*keys("b", ROUND)[::-1], b"c0"]
    assert sorted(asked[4:]) == [B, C], "so many went that the rest may be worth something else by now"


def test_choosing_changes_nothing() -> None:
    chains = tier(A)
    held(chains, (A, keys("a", 3)))
    assert everything(chains) == everything(chains)
    assert len(chains) == 3


@pytest.mark.parametrize("num", [0, 1, 3, 99])
def test_no_more_victims_than_asked_for(num: int) -> None:
    chains = tier(A)
    held(chains, (A, keys("a", 3)))
    assert len(chains.victims(num, list)) == min(num, 3)
