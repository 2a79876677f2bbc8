"""vLLM's KV events as they come over the wire, translated into ours.

Mirrors `vllm/distributed/kv_events.py` without importing it. Token ids, salts and adapter names are on the
wire too and are skipped unread: only hashes go further. Fields we do not know are ignored, events of a
kind we do not know are counted and left out.
"""

from typing import Any, NamedTuple, TypeAlias

import msgspec

from impala_vllm.fleet.places import BlockKey, Tier, keys_of

_TIERS = {"GPU": Tier.HBM, "CPU": Tier.HOST, "STORAGE": Tier.NVME}


class Stored(NamedTuple):
    """A copy more of each block."""

    tier: Tier
    keys: list[BlockKey]
    group: int = 0
    """KV cache group: layers that share a block table. Models with one kind of attention have only 0."""


class Removed(NamedTuple):
    """A copy less of each block; other copies may be left, in the same tier too."""

    tier: Tier
    keys: list[BlockKey]
    group: int = 0


class Cleared(NamedTuple):
    """The replica has dropped all its blocks, in HBM at least."""


Event: TypeAlias = Stored | Removed | Cleared


class Batch(NamedTuple):
    """What one scheduler step changed, in order."""

    written_s: float
    """Wall clock of the server. Told apart by it, never compared with ours."""
    dp_rank: int
    events: list[Event]
    num_unknown: int
    """Events left out: a kind or a medium that we do not know."""


class WireError(ValueError):
    """Not a batch of KV events."""


def decode(payload: bytes) -> Batch:
    """Raises WireError. O(bytes)."""
    try:
        batch = _batch_decoder.decode(payload)
        events = [_translate(event) for event in batch.events]
    except msgspec.ValidationError:
        return _decode_each(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise WireError("not a batch of KV events") from e
    known = [event for event in events if event is not None]
    return Batch(batch.ts, batch.data_parallel_rank or 0, known, len(events) - len(known))


class _BlockStored(msgspec.Struct, tag="BlockStored"):
    block_hashes: list[bytes | int]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class _BlockRemoved(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: list[bytes | int]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class _AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared"):
    pass


_WireEvent: TypeAlias = _BlockStored | _BlockRemoved | _AllBlocksCleared


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_WireEvent]
    data_parallel_rank: int | None = None


class _RawBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _Tag(msgspec.Struct):
    type: str


_batch_decoder = msgspec.msgpack.Decoder(_Batch)
_raw_decoder = msgspec.msgpack.Decoder(_RawBatch)
_event_decoder: msgspec.msgpack.Decoder[_WireEvent] = msgspec.msgpack.Decoder(_WireEvent)
_tag_decoder = msgspec.msgpack.Decoder(_Tag)
_KINDS = {"BlockStored", "BlockRemoved", "AllBlocksCleared"}


def _decode_each(payload: bytes) -> Batch:
    """As `decode`, for a batch with kinds of events we do not know. A broken event of a known kind is an error."""
    events: list[Event] = []
    try:
        batch = _raw_decoder.decode(payload)
        for raw in batch.events:
            if _tag_decoder.decode(raw).type in _KINDS:
                event = _translate(_event_decoder.decode(raw))
                if event is not None:
                    events.append(event)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise WireError("not a batch of KV events") from e
    return Batch(batch.ts, batch.data_parallel_rank or 0, events, len(batch.events) - len(events))


def _translate(event: _WireEvent) -> Event | None:
    if isinstance(event, _AllBlocksCleared):
        return Cleared()
    tier = _tier(event)
    if tier is None:
        return None
    make: Any = Stored if isinstance(event, _BlockStored) else Removed
    return make(tier, keys_of(event.block_hashes), event.group_idx or 0)


def _tier(event: _BlockStored | _BlockRemoved) -> Tier | None:
    if event.locality == "REMOTE":
        return Tier.REMOTE
    return Tier.HBM if event.medium is None else _TIERS.get(event.medium.upper())
