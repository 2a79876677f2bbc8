"""The order in place equals one that is sorted anew after every change."""

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impala_vllm.core import rank

pytest.importorskip("vllm")

from impala_vllm.adapters.vllm.rank_order import RankOrder


@dataclass(eq=False)
class Named:
    """Stands in for a request: all that matters is which one it is."""

    name: int


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["put", "discard"]), st.integers(0, 7), st.integers(0, 1), st.integers(0, 3)), max_size=60
)


@given(ACTIONS, st.lists(st.integers(0, 7), max_size=4, unique=True))
def test_it_is_as_if_sorted_anew(actions: list[tuple[str, int, int, int]], stuck: list[int]):
    requests: list[Any] = [Named(i) for i in range(8)]
    order, model = RankOrder(), dict[int, tuple[Any, Any]]()
    for number, (action, name, priority, cost) in enumerate(actions):
        model.pop(name, None)
        if action == "put":
            key = (priority, rank.IN_TIME if cost else rank.LATE, float(cost), 0.0)
            model[name] = key, number
            order.put(requests[name], key, number)  # type: ignore[arg-type]
        else:
            order.discard(requests[name])
    expected = sorted(model.items(), key=lambda item: item[1])
    assert [requests.index(r) for r in order.requests] == [name for name, _ in expected]
    assert order.asks == [ask for _, (_, ask) in expected]

    behind, asks = order.passed_by(requests[name] for name in stuck)
    passed = {name: n for n, name in enumerate(stuck, 1) if name in model and model[name][0][1] == rank.IN_TIME}
    expected.sort(key=lambda item: (item[1][0][0], passed.get(item[0], 0)))
    assert [(requests.index(r), ask) for r, ask in zip(behind, asks, strict=True)] == [
        (n, ask) for n, (_, ask) in expected
    ]
    assert len(order) == len(model)
    in_time = [(n, ask) for n, (key, ask) in sorted(model.items(), key=lambda i: i[1]) if key[1] == rank.IN_TIME]
    assert [(requests.index(r), ask) for r, ask in order.in_time()] == in_time
    assert all((request in order) == (n in model) for n, request in enumerate(requests))
    assert all(order.ask(requests[n]) == ask for n, (_, ask) in model.items())
