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


def with_caps(room: Room, host: float | None, nvme: float | None) -> Room:
    """The room with the caps that somebody gave by hand in the place of its own."""
    given = {"host_tokens_per_s": host, "nvme_tokens_per_s": nvme}
    return replace(room, **{name: cap for name, cap in given.items() if cap is not None})


def describe(speeds: tuple[float, float], host: float | None, nvme: float | None) -> str:
    """What `sized` and `with_caps` made of the links, whatever the rate is."""
    parts = zip(("host", "NVMe"), speeds, (host, nvme), strict=True)
    return ", ".join(f"{name} {'by hand' if cap is not None else f'{speed:g}x'}" for name, speed, cap in parts)


def prefill_rate(plan: Plan, machine: Machine, logs: Path) -> float:
    """Prompt tokens a second of stock, with nothing else to do. Starts a server for it. Raises ServerError."""
    last = [session.turns[-1] for session in plan.roots()[:NUM_PROMPTS]]

    async def seconds(url: str) -> list[float]:
        return [await _seconds(url, number, turn) for number, turn in enumerate(last)]

    stock = arms.ARMS["stock"]
    with arms.server(replace(stock, name="stock-prefill"), machine, logs) as engine:
        engine.wait_ready()
        took = asyncio.run(seconds(engine.url))
    counted = slice(min(1, len(last) - 1), None)
    return sum(len(turn.prompt) for turn in last[counted]) / sum(took[counted])


async def _seconds(url: str, number: int, turn: PlannedTurn) -> float:
    request_id = f"prefill-{number:06d}"
    # A salt of its own: of a system prompt that others had too, nothing would be computed.
    async with Client(url, "tiny", salt=request_id) as client:
        answer = await client.send(replace(turn, output=turn.output[:1]), request_id, "prefill")
    if answer.error is not None or answer.ttft_s is None:
        raise ServerError(f"cannot measure how fast it prefills: {answer.error or 'no token came'}")
    return answer.ttft_s
