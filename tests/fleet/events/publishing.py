"""A publisher in a few lines, for tests: numbered batches, a memory for replays, several lives, and the truth."""

from collections import Counter

import msgspec

from impala_vllm.fleet.events import Cleared, Event, Removed, Stored
from impala_vllm.fleet.places import BlockKey

_pack = msgspec.msgpack.encode


def stored(*hashes: bytes | int, medium: str | None = "GPU", **more: object) -> dict[str, object]:
    """A BlockStored as vLLM writes it."""
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": None,
        "token_ids": list(range(16 * len(hashes))),
        "block_size": 16,
        "lora_id": None,
        "medium": medium,
        "lora_name": None,
        **more,
    }


def removed(*hashes: bytes | int, medium: str | None = "GPU", **more: object) -> dict[str, object]:
    """A BlockRemoved."""
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": medium, **more}


CLEARED: dict[str, object] = {"type": "AllBlocksCleared"}


def batch(written_s: float, *events: dict[str, object], rank: int | None = 0) -> bytes:
    """A batch on the wire."""
    return _pack([written_s, events, rank])


class Copies:
    """A sink that counts copies."""

    def __init__(self) -> None:
        self.blocks: Counter[BlockKey] = Counter()
        self.num_lost = 0

    def apply(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Stored):
                self.blocks.update(event.keys)
            elif isinstance(event, Removed):
                self.blocks.subtract(event.keys)
                self.blocks = +self.blocks
            elif isinstance(event, Cleared):
                self.blocks.clear()

    def lost(self) -> None:
        self.blocks.clear()
        self.num_lost += 1


class Publisher:
    """What vLLM's does, without sockets."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.now_s = 0.0
        self.restart()

    def restart(self) -> None:
        self.sent: list[bytes] = []
        self.truth = Copies()

    def publish(self, *events: dict[str, object]) -> tuple[int, bytes]:
        self.now_s += 1.0
        payload = batch(self.now_s, *events)
        self.sent.append(payload)
        for event in events:
            hashes = [BlockKey(h) for h in event.get("block_hashes", [])]  # type: ignore[attr-defined]
            if event["type"] == "BlockStored":
                self.truth.blocks.update(hashes)
            elif event["type"] == "BlockRemoved":
                self.truth.blocks.subtract(hashes)
                self.truth.blocks = +self.truth.blocks
            else:
                self.truth.blocks.clear()
        return len(self.sent) - 1, payload

    def replay(self, from_seq: int) -> list[tuple[int, bytes]]:
        numbered = list(enumerate(self.sent))[-self.memory :] if self.memory else []
        return [(seq, payload) for seq, payload in numbered if seq >= from_seq]
