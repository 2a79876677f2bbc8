"""The prefix index against a list of chains."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_vllm.core.identity.index import BrokenChain, PrefixIndex, Tip


def chained(word: list[int]) -> list[bytes]:
    """Hashes of which each stands for all before it."""
    return [bytes(word[: i + 1]) for i in range(len(word))]


words = st.lists(st.integers(0, 1), max_size=12)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 4), words), max_size=30), words, st.integers(1, 5))
def test_index_knows_exactly_the_prefixes_of_its_chains(
    moves: list[tuple[int, list[int]]], asked: list[int], stride: int
) -> None:
    index: PrefixIndex[int] = PrefixIndex(2, stride)
    tips = [Tip(i) for i in range(5)]
    model: dict[int, list[bytes]] = {}
    for owner, word in moves:
        blocks = chained(word)
        index.move(tips[owner], blocks)
        model[owner] = blocks
        index.check_invariants()
        assert len(index) == len({b for chain in model.values() for b in chain})
    blocks = chained(asked)
    known = {b for chain in model.values() for b in chain}
    found = index.match(blocks)
    assert found.depth == sum(b in known for b in blocks)
    shared = {s.tip.owner: s.depth for s in index.near(found, 100)}
    for owner, chain in model.items():
        common = sum(a == b for a, b in zip(chain, blocks, strict=False))
        assert shared.get(owner, 0) == common
    depths = [s.depth for s in index.near(found, 100)]
    assert depths == sorted(depths, reverse=True)


def test_stem_is_what_enough_further_traces_started_with() -> None:
    index: PrefixIndex[str] = PrefixIndex(2)
    index.move(Tip("first"), chained([1, 1, 1, 1]))
    for tail in ([2, 2], [2, 3]):
        found = index.match(chained([1, 1, *tail]))
        assert index.stem_depth(found) == 0
        index.note_start(found)
        index.move(Tip(str(tail)), chained([1, 1, *tail]))
    assert index.stem_depth(index.match(chained([1, 1, 1, 1]))) == 2
    assert index.stem_depth(index.match(chained([1]))) == 1


def test_hashes_that_are_not_chained_are_refused() -> None:
    index: PrefixIndex[int] = PrefixIndex(2, stride=1)
    index.move(Tip(1), [1, 2, 3])
    with pytest.raises(BrokenChain):
        index.move(Tip(2), [9, 8, 2])
    with pytest.raises(BrokenChain):
        PrefixIndex[int](2, stride=1).move(Tip(1), [1, 1])
