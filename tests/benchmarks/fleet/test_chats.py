"""Recorded sessions as chats: they share what the recording shared, and a next turn repeats the one before it."""

from random import Random

import pytest

from benchmarks.fleet import chats
from benchmarks.fleet.sessions import Step
from benchmarks.fleet.tokens import tokens_of
from impala_vllm.fleet.places import key_of

STEM, OWN, OTHER = (tuple(key_of(100 * who + i) for i in range(40)) for who in range(1, 4))


def step(keys, gap_s=0.0) -> Step:
    return Step(list(keys), 256 * len(keys), 256, 160, gap_s)


@pytest.fixture(scope="module")
def words(tokenizer):
    return chats.Words(tokenizer)


def shared(tokenizer, one, other) -> int:
    """Whole blocks of 16 tokens that two chats have in common."""
    tokens = [tokens_of(tokenizer, {"messages": messages}) for messages in (one, other)]
    equal = next((i for i, (a, b) in enumerate(zip(*tokens, strict=False)) if a != b), min(map(len, tokens)))
    return equal // 16


def test_a_block_is_sixteen_tokens(tokenizer, words):
    for key in STEM:
        assert len(tokenizer.encode(words.of(key))) == chats.WORDS


def test_a_next_turn_repeats_the_messages_of_the_one_before(words):
    first, second, third = chats.recorded([step(OWN[:10]), step(OWN[:20]), step(OWN[:33])], words, 16, 4.0)
    assert second.messages[: len(first.messages)] == first.messages
    assert third.messages[: len(second.messages)] == second.messages
    assert [m["role"] for m in third.messages] == ["system", "user", "assistant", "user", "assistant", "user"]


def test_sessions_share_their_stem_and_no_more(tokenizer, words):
    (one,) = chats.recorded([step([*STEM[:20], *OWN[:20]])], words, 16, 4.0)
    (other,) = chats.recorded([step([*STEM[:20], *OTHER[:20]])], words, 16, 4.0)
    assert 19 <= shared(tokenizer, one.messages, other.messages) <= 21


def test_a_rollback_shares_what_it_went_back_to(tokenizer, words):
    whole, back = chats.recorded([step(OWN[:30]), step([*OWN[:15], *OTHER[:10]])], words, 16, 4.0)
    assert 14 <= shared(tokenizer, whole.messages, back.messages) <= 16


def test_gaps_and_outputs_shrink(words):
    (ask,) = chats.recorded([step(OWN, gap_s=8.0)], words, 16, 4.0)
    assert (ask.gap_s, ask.num_output) == (2.0, 10)


def test_an_agent_waits_between_its_turns_only():
    asks = chats.agent(5, Random(0))
    assert [ask.gap_s > 0 for ask in asks] == [False, True, True, True, True]
    assert asks[1].messages[:2] == asks[0].messages
