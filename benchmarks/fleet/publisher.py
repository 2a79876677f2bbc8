"""KV events on the wire as vLLM's publisher sends them, replays included, on the caller's event loop.

vLLM's own costs an import of vLLM and a thread; sixty-four of these fit one machine. The tests of `fleet.events` use
vLLM's.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from impala_vllm.fleet.places import BlockKey

_END = (-1).to_bytes(8, "big", signed=True)
_pack = msgspec.msgpack.Encoder().encode


class Publisher:
    """PUB and ROUTER on free ports of `host`."""

    def __init__(self, host: str = "127.0.0.1", memory: int = 10_000) -> None:
        self._context = zmq.asyncio.Context()
        self._events: Any = self._context.socket(zmq.PUB)
        self._replays: Any = self._context.socket(zmq.ROUTER)
        self.endpoint = f"tcp://{host}:{self._events.bind_to_random_port(f'tcp://{host}')}"
        self.replay_endpoint = f"tcp://{host}:{self._replays.bind_to_random_port(f'tcp://{host}')}"
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=memory)
        self._next = 0
        self._task = asyncio.create_task(self._answer())

    def stored(
        self,
        keys: Sequence[BlockKey],
        medium: str = "GPU",
        parent: BlockKey | None = None,
        tokens: Sequence[int] = (),
    ) -> dict[str, Any]:
        """A BlockStored: blocks in a row, the first behind `parent`."""
        return {"type": "BlockStored", "block_hashes": list(keys), "parent_block_hash": parent,
                "token_ids": list(tokens), "block_size": 16, "lora_id": None, "medium": medium, "lora_name": None,
                "group_idx": 0}  # fmt: skip

    def stored_chain(
        self, keys: Sequence[BlockKey], new: Sequence[BlockKey], tokens: Sequence[int]
    ) -> list[dict[str, Any]]:
        """What is `new` of a chain, in its order: an event for each run of blocks in a row.

        `tokens`: of the whole prompt, or none.
        """
        events: list[dict[str, Any]] = []
        fresh, start = set(new), None
        for i in range(len(keys) + 1):
            is_new = i < len(keys) and keys[i] in fresh
            if is_new and start is None:
                start = i
            elif not is_new and start is not None:
                parent = keys[start - 1] if start else None
                events.append(self.stored(keys[start:i], parent=parent, tokens=tokens[16 * start : 16 * i]))
                start = None
        return events

    def removed(self, keys: list[BlockKey], medium: str = "GPU") -> dict[str, Any]:
        """A BlockRemoved."""
        return {"type": "BlockRemoved", "block_hashes": keys, "medium": medium, "group_idx": 0}

    async def publish(self, *events: dict[str, Any]) -> None:
        """One batch."""
        payload = _pack([time.time(), list(events), 0])
        self._sent.append((self._next, payload))
        await self._events.send_multipart((b"", self._next.to_bytes(8, "big"), payload))
        self._next += 1

    async def close(self) -> None:
        """Give the ports back."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._context.destroy(linger=0)

    async def _answer(self) -> None:
        while True:
            client, _, start = await self._replays.recv_multipart()
            first = int.from_bytes(start, "big")
            for seq, payload in [one for one in self._sent if one[0] >= first]:
                await self._replays.send_multipart((client, b"", b"", seq.to_bytes(8, "big"), payload))
            await self._replays.send_multipart((client, b"", b"", _END, b""))
