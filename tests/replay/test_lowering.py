"""Prompts share in the replay exactly what they shared in the recording."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impala_vllm.core.types import Outcome
from impala_vllm.replay.lowering import Scale, lower
from impala_vllm.replay.plan import PlannedTurn
from impala_vllm.replay.vocabulary import Vocabulary
from impala_vllm.workload import Turn

WORDS = Vocabulary(first_plain=10, last_plain=4000, eos=2, tool_call=3)
SCALE = Scale(prompt=32, output=8)


def shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def planned(turns: list[Turn], scale: Scale = SCALE) -> list[PlannedTurn]:
    (session,) = lower(turns, scale, WORDS).sessions
    return list(session.turns)


def test_a_continuation_starts_with_the_prompt_and_output_before_it(recorded: Callable[..., Turn]) -> None:
    first, second = planned([recorded("t", 0, [1, 2, 3], tail=40), recorded("t", 1, [1, 2, 3, 4, 5, 6], at=2)])
    before = first.prompt + first.output
    assert second.prompt[: len(before)] == before


def test_an_output_is_counted_once_in_the_next_prompt(recorded: Callable[..., Turn]) -> None:
    # 192 new tokens, 128 of them output: the output's own length (16) plus 64/32 of tool result.
    first, second = planned([recorded("t", 0, [1], output=128), recorded("t", 1, [1, 2, 3, 4], at=2)])
    assert len(first.output) == 16
    assert len(second.prompt) == len(first.prompt) + 16 + 2


def test_a_rollback_keeps_the_recorded_prefix_and_no_more(recorded: Callable[..., Turn]) -> None:
    turns = planned([
        recorded("t", 0, [1, 2]),
        recorded("t", 1, [1, 2, 3, 4, 5], at=2),
        recorded("t", 2, [1, 2, 3, 9, 10], at=4),
    ])  # fmt: skip
    after_three = len(turns[0].prompt) + len(turns[0].output)
    assert shared(turns[1].prompt, turns[2].prompt) >= after_three
    assert shared(turns[1].prompt, turns[2].prompt) < len(turns[1].prompt)


def test_a_compaction_keeps_the_stem_only(recorded: Callable[..., Turn]) -> None:
    turns = planned([recorded("t", 0, [1, 2, 3, 4]), recorded("t", 1, [1, 2, 50, 51], at=2)])
    assert shared(turns[0].prompt, turns[1].prompt) == 4


def test_a_retry_is_the_same_prompt(recorded: Callable[..., Turn]) -> None:
    turns = planned([recorded("t", 0, [1, 2], tail=50), recorded("t", 1, [1, 2], tail=50, at=2)])
    assert turns[0].prompt == turns[1].prompt
    assert turns[0].output != turns[1].output


def test_an_output_that_was_dropped_is_not_put_into_the_next_prompt(recorded: Callable[..., Turn]) -> None:
    first, second = planned([recorded("t", 0, [1, 2], output=500), recorded("t", 1, [1, 2, 3], at=2)])
    assert second.prompt[: len(first.prompt)] == first.prompt
    assert second.prompt[len(first.prompt) :][:4] != first.output[:4]


def test_sessions_with_equal_stem_blocks_share_their_tokens(recorded: Callable[..., Turn]) -> None:
    plan = lower([recorded("a", 0, [1, 2, 10]), recorded("b", 0, [1, 2, 20])], SCALE, WORDS)
    a, b = (s.turns[0].prompt for s in plan.sessions)
    assert shared(a, b) == 4


def test_outputs_end_as_recorded(recorded: Callable[..., Turn]) -> None:
    calls, stops, runs_out = planned([
        recorded("t", 0, [1], outcome=Outcome.TOOL_CALL),
        recorded("t", 1, [1, 2, 3], at=2, outcome=Outcome.STOP),
        recorded("t", 2, [1, 2, 3, 4, 5], at=4, outcome=Outcome.LENGTH),
    ])  # fmt: skip
    assert WORDS.tool_call in calls.output
    assert calls.output[-1] == WORDS.eos
    assert stops.output[-1] == WORDS.eos
    assert WORDS.tool_call not in stops.output
    assert WORDS.eos not in runs_out.output


@pytest.mark.parametrize(("recorded_tokens", "planned_tokens"), [(1, 4), (80, 10), (100_000, 48)])
def test_outputs_shrink_within_their_bounds(
    recorded: Callable[..., Turn], recorded_tokens: int, planned_tokens: int
) -> None:
    (turn,) = planned([recorded("t", 0, [1], output=recorded_tokens)])
    assert len(turn.output) == planned_tokens


def test_gaps_shrink_and_are_capped(recorded: Callable[..., Turn]) -> None:
    turns = planned([
        recorded("t", 0, [1], at=0),
        recorded("t", 1, [1, 2], at=6.5),
        recorded("t", 2, [1, 2, 3], at=1000),
        recorded("t", 3, [1, 2, 3, 4], at=1000.1),
    ])  # fmt: skip
    assert [t.gap_s for t in turns] == [0.0, 1.0, 15.0, 0.0]


def test_a_session_is_cut_before_it_outgrows_the_context_and_that_is_counted(recorded: Callable[..., Turn]) -> None:
    turns = [recorded("t", i, list(range(1, 2 + i * 20)), at=2.0 * i) for i in range(5)]
    plan = lower(turns, Scale(max_context_tokens=100), WORDS)
    assert len(plan.sessions[0].turns) < 5
    assert plan.num_capped_sessions == 1
    assert plan.num_dropped_turns == 5 - len(plan.sessions[0].turns)
    assert all(len(t.prompt) + len(t.output) <= 100 for t in plan.sessions[0].turns)


def test_a_child_hangs_below_the_turn_it_followed_and_is_joined_by_the_next(recorded: Callable[..., Turn]) -> None:
    turns = [
        recorded("p", 0, [1], at=0),
        recorded("p", 1, [1, 2], at=10),
        recorded("p", 2, [1, 2, 3], at=100),
        recorded("p/c", 0, [70], at=16.5, parent="p"),
        recorded("p/c", 1, [70, 71], at=20, parent="p"),
    ]
    parent, child = lower(turns, SCALE, WORDS).sessions
    assert (child.parent_id, child.after_turn, child.start_gap_s) == ("p", 1, 1.0)
    assert [t.joins for t in parent.turns] == [(), (), ("p/c",)]
    # The gap before the join counts from the child's end at 20.5.
    assert parent.turns[2].gap_s == pytest.approx(79.5 / 6)


def test_a_child_of_a_turn_that_was_cut_is_left_out(recorded: Callable[..., Turn]) -> None:
    turns = [recorded("p", i, list(range(1, i + 2)), at=10.0 * i) for i in range(4)]
    turns.append(recorded("p/c", 0, [70], at=35, parent="p"))
    plan = lower(turns, Scale(num_turns=2), WORDS)
    assert [s.session_id for s in plan.sessions] == ["p"]


@st.composite
def sessions(draw: st.DrawFn) -> list[list[int]]:
    """Chains of block ids that grow, fall back to a random depth, or repeat; ids are chained."""
    chains: list[list[int]] = []
    fresh = iter(range(1, 10_000))
    for _ in range(draw(st.integers(1, 8))):
        base = draw(st.sampled_from(chains)) if chains else []
        depth = draw(st.integers(0, len(base)))
        chains.append(base[:depth] + [next(fresh) for _ in range(draw(st.integers(0 if depth else 1, 6)))])
    return chains


@settings(max_examples=200)
@given(chains=sessions(), outputs=st.lists(st.integers(1, 400), min_size=8, max_size=8), tails=st.integers(0, 63))
def test_recorded_prefixes_are_kept_exactly(chains: list[list[int]], outputs: list[int], tails: int) -> None:
    turns = [
        Turn(
            request_id=f"t#{i}", arrival_s=float(i), finish_s=i + 0.5, blocks=tuple(chain), block_size=64,
            input_tokens=len(chain) * 64 + tails, output_tokens=outputs[i], trace_id="t",
        )
        for i, chain in enumerate(chains)
    ]  # fmt: skip
    plan = lower(turns, Scale(max_context_tokens=10**9), WORDS)
    assert plan == lower(turns, Scale(max_context_tokens=10**9), WORDS)
    prompts = {t.request_id: t.prompt for _, _, t in plan.turns()}
    for i, a in enumerate(turns):
        for b in turns[:i]:
            same = shared(a.blocks, b.blocks)
            # A shared chain of blocks is a shared run of tokens, at least two a block but for the
            # blocks that hold an output, which are longer or empty.
            common = shared(prompts[a.request_id], prompts[b.request_id])
            if same == len(a.blocks) == len(b.blocks):
                assert prompts[a.request_id] == prompts[b.request_id]
            elif same == 0:
                assert common <= 1
            elif same == len(b.blocks):
                assert common >= len(prompts[b.request_id]) - tails // 32
