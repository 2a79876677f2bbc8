"""How fast the links of tiers are: multiples of the engine's own prefill rate, as a GPU's links are of its.

A copy between two places of the same DRAM is nearly free; capped at these ratios it costs what it would there.
"""

import asyncio
from dataclasses import replace
from pathlib import Path

from impala_vllm.replay import arms
from impala_vllm.replay.arms import Machine, Room
from impala_vllm.replay.client import Client
from impala_vllm.replay.plan import Plan, PlannedTurn
from impala_vllm.replay.server import ServerError

NUM_PROMPTS = 6
"""Prefilled one after the other; the first only warms the engine up."""


def sized(room: Room, speeds: tuple[float, float], plan: Plan, machine: Machine, logs: Path) -> Room:
    """The room with links to host and to NVMe so many times as fast as the engine prefills, to two digits."""
    rate = prefill_rate(plan, machine, logs)
    host, nvme = (float(f"{speed * rate:.2g}") for speed in speeds)
    return replace(room, host_tokens_per_s=host, nvme_tokens_per_s=nvme)


def prefill_rate(plan: Plan, machine: Machine, logs: Path) -> float:
    """Prompt tokens a second of stock, with nothing else to do. Starts a server for it. Raises ServerError."""
    last = [session.turns[-1] for session in plan.roots()[:NUM_PROMPTS]]

    async def seconds(url: str) -> list[float]:
        async with Client(url, "tiny", salt="prefill") as client:
            return [await _seconds(client, number, turn) for number, turn in enumerate(last)]

    stock = arms.ARMS["stock"]
    with arms.server(replace(stock, name="stock-prefill"), machine, logs) as engine:
        engine.wait_ready()
        took = asyncio.run(seconds(engine.url))
    counted = slice(min(1, len(last) - 1), None)
    return sum(len(turn.prompt) for turn in last[counted]) / sum(took[counted])


async def _seconds(client: Client, number: int, turn: PlannedTurn) -> float:
    answer = await client.send(replace(turn, output=turn.output[:1]), f"prefill-{number:06d}", "prefill")
    if answer.error is not None or answer.ttft_s is None:
        raise ServerError(f"cannot measure how fast it prefills: {answer.error or 'no token came'}")
    return answer.ttft_s
