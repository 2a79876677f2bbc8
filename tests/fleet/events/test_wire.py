"""Decoding, against vLLM's own structs and against what a later vLLM may send."""

import msgspec
import pytest

from impala_vllm.fleet.events.wire import Cleared, Removed, Stored, WireError, decode
from impala_vllm.fleet.places import Tier, key_of
from tests.fleet.events.publishing import CLEARED, batch, removed, stored

A, B = bytes(range(32)), bytes(range(32, 64))


def test_what_vllm_writes_is_read():
    kv_events = pytest.importorskip("vllm.distributed.kv_events")
    written = kv_events.KVEventBatch(
        ts=12.5,
        events=[
            kv_events.BlockStored(
                block_hashes=[A, B],
                parent_block_hash=None,
                token_ids=list(range(32)),
                block_size=16,
                lora_id=3,
                medium="GPU",
                lora_name="adapter",
                extra_keys=[("adapter", "salt"), None],
                group_idx=1,
                session_id="s",
            ),
            kv_events.BlockRemoved(block_hashes=[A], medium="STORAGE", group_idx=0),
            kv_events.AllBlocksCleared(),
        ],
        data_parallel_rank=2,
    )
    found = decode(msgspec.msgpack.encode(written))
    assert found.written_s == 12.5
    assert found.dp_rank == 2
    assert found.num_unknown == 0
    assert found.events == [
        Stored(Tier.HBM, [key_of(A), key_of(B)], group=1),
        Removed(Tier.NVME, [key_of(A)]),
        Cleared(),
    ]


def test_hashes_written_as_integers_and_as_bytes_are_the_same_blocks():
    as_integer = int.from_bytes(A, "big") & ((1 << 64) - 1)
    assert decode(batch(1.0, stored(A))).events == decode(batch(1.0, stored(as_integer))).events


@pytest.mark.parametrize(
    ("fields", "tier"),
    [
        ({"medium": "GPU"}, Tier.HBM),
        ({"medium": None}, Tier.HBM),
        ({"medium": "cpu"}, Tier.HOST),
        ({"medium": "STORAGE"}, Tier.NVME),
        ({"medium": "STORAGE", "locality": "LOCAL"}, Tier.NVME),
        ({"medium": "STORAGE", "locality": "REMOTE"}, Tier.REMOTE),
    ],
)
def test_media_become_tiers(fields, tier):
    assert decode(batch(1.0, removed(1, **fields))).events == [Removed(tier, [key_of(1)])]


def test_unknown_fields_kinds_and_media_do_not_hide_what_is_known():
    found = decode(
        batch(
            1.0,
            stored(1, colour="red"),
            {"type": "BlockMoved", "block_hashes": "none of your business"},
            stored(2, medium="TAPE"),
            CLEARED,
        )
    )
    assert found.events == [Stored(Tier.HBM, [key_of(1)]), Cleared()]
    assert found.num_unknown == 2


def test_a_batch_of_a_later_vllm_may_be_longer_and_an_older_one_shorter():
    assert decode(msgspec.msgpack.encode([1.0, [CLEARED], 4, "more", {}])).dp_rank == 4
    assert decode(msgspec.msgpack.encode([1.0, [CLEARED]])).dp_rank == 0


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x93",
        msgspec.msgpack.encode({"ts": 1}),
        msgspec.msgpack.encode(["now", []]),
        msgspec.msgpack.encode([1.0, [17]]),
        msgspec.msgpack.encode([1.0, [{"type": "BlockStored", "block_hashes": "text"}]]),
        b"\x93\xcb" + bytes(8) + b"\x91" * 5000,
    ],
)
def test_what_is_no_batch_is_an_error_and_nothing_else(payload):
    with pytest.raises(WireError):
        decode(payload)
