"""What a plan says of itself."""

from impala_vllm.replay.plan import Plan, PlannedSession, PlannedTurn
from impala_vllm.replay.synthetic import fan_out, independent, labelling
from impala_vllm.replay.vocabulary import Vocabulary


def one(name: str, *turns: tuple[tuple[int, ...], tuple[int, ...]]) -> PlannedSession:
    return PlannedSession(name, tuple(PlannedTurn(f"{name}#{i}", p, o, 0.0) for i, (p, o) in enumerate(turns)))


def test_new_tokens_are_what_an_infinite_cache_still_computes() -> None:
    first = tuple(range(8))
    plan = Plan((one("a", (first, (90, 91)), ((*first, 90, 91, 92, 93), (94,))),))
    # Blocks of 4: turn 1 finds both of turn 0's and computes 4; the last token always counts.
    assert plan.new_tokens(4) == 8 + 4
    assert Plan((one("a", (first, (9,)), (first, (9,))),)).new_tokens(4) == 8 + 4


def test_the_working_set_counts_a_shared_opening_once() -> None:
    plan = Plan((one("a", ((1, 2, 3), (4,))), one("b", ((1, 2, 9), (8,))), one("c", ((1, 2, 3), (4,)))))
    assert plan.working_set_tokens() == 6


def test_forks_share_their_parents_context_and_are_joined(vocabulary: Vocabulary) -> None:
    plan = fan_out(vocabulary, num_forks=8)
    (parent,) = plan.roots()
    context = parent.turns[0].prompt + parent.turns[0].output
    children = [s for s in plan.sessions if s.parent_id]
    assert len(children) == 8
    assert all(c.turns[0].prompt[: len(context)] == context for c in children)
    assert set(parent.turns[1].joins) == {c.session_id for c in children}


def test_jobs_share_the_stem_and_single_requests_nothing(vocabulary: Vocabulary) -> None:
    jobs = labelling(vocabulary, num_jobs=3, stem_tokens=64, item_tokens=16)
    assert len({s.turns[0].prompt[:64] for s in jobs.sessions}) == 1
    assert len({s.turns[0].prompt for s in jobs.sessions}) == 3
    singles = independent(vocabulary, [(50, 4), (60, 8)])
    assert [(len(s.turns[0].prompt), len(s.turns[0].output)) for s in singles.sessions] == [(50, 4), (60, 8)]
    assert singles.new_tokens(16) == 110
