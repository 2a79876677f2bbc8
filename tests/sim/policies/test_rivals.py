"""Published policies: whatever they hold back, everybody is served."""

from dataclasses import replace

import pytest

from impala_vllm.sim.policies import KINDS
from impala_vllm.sim.simulation import Setup, run
from tests.sim.scenes import TIMING, session, with_gaps, workload
from tests.sim.test_simulation import agents

RIVALS = [name for name, kind in KINDS.items() if name not in ("stock", "impala") and not kind.is_unbounded]


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("hbm_tokens", [104, 140, 200])
def test_however_short_memory_is_every_turn_is_served(name, hbm_tokens):
    """Pins, pauses and windows must never leave an engine idle for good; `run` asserts that all is served."""
    load = agents(count=10)
    load = replace(load, sessions=tuple(with_gaps(s, *([0.5, 40.0, 0.5, 7.0, 90.0])) for s in load.sessions))
    found = run(load, Setup(TIMING, hbm_tokens), KINDS[name])
    assert found.measures.makespan_s < 100 * run(load, Setup(TIMING, hbm_tokens), KINDS["stock"]).measures.makespan_s


def families(count, parent_tokens, child_tokens):
    """Parents whose second turn waits for two children of the first; one of those waits for a child of its own."""
    made = []
    for i in range(count):
        parent, child, other, below = (
            session(f"{name}{i}", [tokens, tokens + 4], output=3, gap_s=1.0 + i, stem=8)
            for name, tokens in zip("pcob", (parent_tokens, child_tokens, child_tokens, child_tokens), strict=True)
        )
        for above, names in ((parent, (f"c{i}", f"o{i}")), (child, (f"b{i}",))):
            turns = (above.turns[0], replace(above.turns[1], joins=names))
            made.append(replace(above, turns=turns, parent_id=None if above is parent else f"p{i}", after_turn=0))
        made.append(replace(other, parent_id=f"p{i}", after_turn=0))
        made.append(replace(below, parent_id=f"c{i}", after_turn=0))
    return workload(*(replace(s, after_turn=-1) if s.parent_id is None else s for s in made))


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("host_tokens", [0, 400])
@pytest.mark.parametrize(("count", "parent_tokens", "child_tokens"), [(1, 600, 450), (1, 900, 900), (6, 300, 200)])
def test_nobody_waits_for_ever_for_a_child(name, host_tokens, count, parent_tokens, child_tokens):
    load = families(count, parent_tokens, child_tokens)
    found = run(load, Setup(TIMING, 1000, host_tokens=host_tokens), KINDS[name])
    assert len(found.served) == load.num_turns()
