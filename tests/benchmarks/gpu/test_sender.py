"""The client in the engine's process, on an engine that says from where it is called."""

import threading
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from benchmarks.gpu.engine import Sender
from impala_vllm.replay.plan import PlannedTurn

SETTING = ContextVar("setting", default="of nobody")
"""vLLM keeps some of its own so."""


class Engine:
    """Gives each request one token a step."""

    def __init__(self) -> None:
        self.engine_core = SimpleNamespace()
        self.steppers: set[int] = set()
        self._open: dict[str, list[int]] = {}

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self._open[request_id] = list(params.extra_args["forced_output"])

    def step(self) -> list[Any]:
        self.steppers.add(threading.get_ident())
        assert SETTING.get() == "of the caller"
        made: list[Any] = []
        for request_id, left in list(self._open.items()):
            token = left.pop(0)
            outputs = [SimpleNamespace(token_ids=[token])]
            made.append(SimpleNamespace(request_id=request_id, num_cached_tokens=3, outputs=outputs, finished=not left))
            if not left:
                del self._open[request_id]
        return made


async def test_turns_are_answered_and_every_step_is_one_threads():
    SETTING.set("of the caller")
    engine = Engine()
    async with Sender(SimpleNamespace(llm_engine=engine)) as sender:
        for number in range(20):
            turn = PlannedTurn(str(number), (1, 2), (5, 6, 7), 0.0)
            answer = await sender.send(turn, str(number), "a session")
            assert (answer.error, answer.output_tokens, answer.cached_tokens) == (None, 3, 3)
    assert len(engine.steppers) == 1
    assert threading.get_ident() not in engine.steppers
