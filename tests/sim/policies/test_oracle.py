"""Bounds that know the future: Belady's evictions, and impala with the times that are recorded.

Examples are computed by hand: 1 s a step, 0.5 s a prompt token, 0.25 s a decode.
"""

import math
from dataclasses import replace

from impala_vllm.core.types import TraceId
from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.policies.belady import Belady
from impala_vllm.sim.policies.oracle import Oracle
from tests.sim.scenes import Scene, session, workload
from tests.sim.test_client import family


def test_belady_gives_up_what_is_used_last():
    load = workload(
        session("soon", [16, 20], output=1, gap_s=60.0), session("late", [16, 20], output=1, gap_s=200.0),
        session("new", [8], output=1),
    )  # fmt: skip
    starts = (0.0, 20.0, 40.0)
    cached = {}
    for policy in (Belady, KINDS["stock"].make):
        served = Scene(load, num_blocks=9, policy=policy).play(*starts).client.served
        cached[policy] = {s.session_id: s.cached_tokens for s in served if s.index == 1}
    # Nine blocks: four of each session, one fresh. The new prompt and its output take three: two are given up.
    assert cached[Belady]["soon"] == 16
    assert cached[KINDS["stock"].make]["soon"] < 16


def test_the_oracle_knows_when_a_trace_is_back():
    scene = Scene(workload(session("a", [16, 20], output=1, gap_s=60.0)), policy=Oracle)
    policy = scene.replica.policy
    assert isinstance(policy, Oracle)
    seen: list[float | None] = []
    scene.loop.at(
        39.5, lambda: seen.append(policy.gaps.median_remaining_s(next(iter(policy.identity.traces)).trace_id, 39.5))
    )
    scene.play()
    # The first turn ends at 9 s and the second begins at 69.
    assert seen == [29.5]


def test_the_oracle_waits_for_a_parent_that_is_late():
    # It is expected after the tools that are recorded; what the turns of its child take is the server's doing.
    load, late = family(), []
    scene = Scene(load, policy=Oracle)
    policy = scene.replica.policy
    assert isinstance(policy, Oracle)
    parent, served = load.roots()[0].session_id, scene.client.served

    def look():
        name = policy._silent.get(parent)
        if name is not None and not any(s.session_id == parent and s.index == 1 for s in served):
            late.append(policy.gaps.quantile_remaining_s(name, 0.5, scene.loop.now))
        if len(served) < load.num_turns():
            scene.loop.at(scene.loop.now + 0.5, look)

    scene.loop.at(0.5, look)
    scene.play()
    assert 0.0 in late, "it was overdue"
    assert math.inf not in late


def test_the_oracle_gives_up_a_trace_whose_session_came_back_as_another():
    one = session("a", [16, 16], output=1, gap_s=20.0)
    other = session("b", [16], output=1).turns[0]
    load = workload(replace(one, turns=(one.turns[0], replace(other, gap_s=20.0))))
    scene = Scene(load, policy=Oracle)
    policy = scene.replica.policy
    assert isinstance(policy, Oracle)
    told: list[float | None] = []
    scene.loop.at(10.0, lambda: told.append(policy.gaps.quantile_remaining_s(policy._silent["a"], 0.5, 10.0)))
    names: list[TraceId] = []
    scene.loop.at(10.0, lambda: names.append(policy._silent["a"]))
    scene.loop.at(30.0, lambda: told.append(policy.gaps.quantile_remaining_s(names[0], 0.5, 30.0)))
    scene.play()
    assert told == [19.0, math.inf]
