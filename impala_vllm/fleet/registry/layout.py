"""How a replica's residency lies in Redis, under keys that name everything it depends on.

    impala:1:{NAMESPACE/SERVER#RANK/EPOCH}:owner     the router that tells of it; expires unless renewed
    ...:head      the generation, and nothing else
    ...:blocks:G  hash of generation G: block key (8 bytes) -> tiers that hold it (a byte)
    ...:changes   stream of blocks that changed, numbered within G; what it no longer has is in the hash

The braces would keep a replica's keys in one slot of a Redis Cluster; the client speaks to one server. NAMESPACE is a
digest of model, revision, dtype, vLLM and hash scheme: routers that hash otherwise never meet. Salts and adapters are
inside the block hashes themselves.
"""

import struct
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple, TypeAlias, cast

from impala_vllm.fleet.hashing import Hello
from impala_vllm.fleet.places import BlockKey, Replica
from impala_vllm.fleet.registry.shared import Held

BLOCKS_A_WRITE = 2000
MAX_CHANGES = 4096
"""Entries a stream keeps, about; who falls behind further reads everything again."""
KEPT_MS = 600_000
"""How long what nobody renews lies there. Whoever takes a lease writes all of it anew, so it need not be long; and each
restart of an engine leaves a life behind."""
_HELD = struct.Struct(">QB")

Client = Any
"""`redis.asyncio.Redis`, whose types say less than they seem to."""


class Place(NamedTuple):
    """A replica's keys."""

    base: str

    @property
    def owner(self) -> str:
        """Who tells."""
        return self.base + ":owner"

    @property
    def head(self) -> str:
        """The generation."""
        return self.base + ":head"

    @property
    def changes(self) -> str:
        """The stream."""
        return self.base + ":changes"

    def blocks(self, generation: str) -> str:
        """The hash."""
        return f"{self.base}:blocks:{generation}"


class Cursor(NamedTuple):
    """How far a reader has come."""

    generation: str
    entry: bytes
    number: int


class Lost(Exception):
    """Changes have been missed, or a new generation has begun: read everything again."""


def namespace(hello: Hello) -> str:
    """Of everything that must be equal for one's hashes to mean the other's KV."""
    rank = hello.ranks[0]
    scheme = (rank.algorithm, rank.none_hash, rank.block_tokens, rank.groups)
    told = repr((hello.model, hello.revision, hello.dtype, hello.vllm_version, scheme))
    return blake2b(told.encode(), digest_size=8).hexdigest()


def place(space: str, replica: Replica, epoch: str) -> Place:
    """The keys of one life of a replica."""
    return Place(f"impala:1:{{{space}/{replica.server}#{replica.dp_rank}/{epoch}}}")


async def renew(client: Client, where: Place, generation: str) -> None:
    """Keep what lies there for another while."""
    pipe = client.pipeline(transaction=False)
    pipe.pexpire(where.head, KEPT_MS)
    _keep(pipe, where, generation)
    await pipe.execute()


async def begin(client: Client, where: Place, before: str | None) -> None:
    """Void what was told, by whomever, and `before`, half told by us. Readers start over once `finish` was called."""
    pipe = client.pipeline(transaction=True)
    pipe.get(where.head)
    pipe.delete(where.head)
    head, _ = await pipe.execute()
    void = {generation for generation in (head and head.decode(), before) if generation}
    if void:
        await client.unlink(*map(where.blocks, void))


async def fill(client: Client, where: Place, generation: str, blocks: Sequence[Held]) -> None:
    """Part of a new generation, before `finish`."""
    pipe = client.pipeline(transaction=False)
    for part in _parts(blocks):
        pipe.hset(where.blocks(generation), mapping={_field(held.key): bytes((held.tiers,)) for held in part})
    _keep(pipe, where, generation)
    await pipe.execute()


async def finish(client: Client, where: Place, generation: str) -> None:
    """The generation is whole; its changes are numbered from 1."""
    pipe = client.pipeline(transaction=True)
    pipe.xadd(where.changes, {"g": generation, "n": 0, "b": b""}, maxlen=MAX_CHANGES, approximate=True)
    pipe.set(where.head, generation, px=KEPT_MS)
    _keep(pipe, where, generation)
    await pipe.execute()


async def tell(client: Client, where: Place, generation: str, number: int, blocks: Sequence[Held]) -> int:
    """Write changed blocks; the next number."""
    pipe = client.pipeline(transaction=True)
    for part in _parts(blocks):
        come = {_field(held.key): bytes((held.tiers,)) for held in part if held.tiers}
        gone = [_field(held.key) for held in part if not held.tiers]
        if come:
            pipe.hset(where.blocks(generation), mapping=come)
        if gone:
            pipe.hdel(where.blocks(generation), *gone)
        packed = b"".join(_HELD.pack(*held) for held in part)
        entry = {"g": generation, "n": number, "b": packed}
        pipe.xadd(where.changes, entry, maxlen=MAX_CHANGES, approximate=True)
        number += 1
    _keep(pipe, where, generation)
    await pipe.execute()
    return number


async def look(client: Client, where: Place) -> Cursor | None:
    """Where `follow` goes on from once everything has been read; None where nobody tells."""
    head = await client.get(where.head)
    if head is None:
        return None
    generation = head.decode()
    last = await client.xrevrange(where.changes, count=1)
    if not last:
        return None
    entry, fields = last[0]
    return Cursor(generation, entry, int(fields[b"n"]))


async def read(client: Client, where: Place, generation: str, at: int) -> tuple[int, list[Held]]:
    """Part of everything, about `BLOCKS_A_WRITE` blocks, from 0 on; and where the next part is, 0 after the last.

    What changes between the parts may be missing or old: `follow` from where `look` was tells it again.
    """
    after, found = await client.hscan(where.blocks(generation), at, count=BLOCKS_A_WRITE)
    return after, [
        Held(BlockKey(int.from_bytes(field, "big")), tiers[0])
        for field, tiers in found.items()
        if len(field) == 8 and len(tiers) == 1
    ]


def follow(entries: "Entries", cursor: Cursor) -> tuple[Cursor, list[Held]]:
    """What a stream's further entries tell. Raises Lost."""
    blocks: list[Held] = []
    for entry, fields in entries:
        try:
            generation, number, packed = fields[b"g"].decode(), int(fields[b"n"]), fields[b"b"]
            told = [Held(BlockKey(key), tiers) for key, tiers in _HELD.iter_unpack(packed)]
        except (KeyError, ValueError, struct.error) as e:
            raise Lost from e
        if generation != cursor.generation or number != cursor.number + 1:
            raise Lost
        cursor = Cursor(generation, entry, number)
        blocks += told
    return cursor, blocks


def _keep(pipe: Client, where: Place, generation: str) -> None:
    """With every write: who dies right after it renews nothing any more."""
    for key in (where.changes, where.blocks(generation)):
        pipe.pexpire(key, KEPT_MS)


def _field(key: BlockKey) -> bytes:
    return key.to_bytes(8, "big")


def _parts(blocks: Sequence[Held]) -> Iterator[list[Held]]:
    rest = iter(blocks)
    while part := list(islice(rest, BLOCKS_A_WRITE)):
        yield part


Entries: TypeAlias = list[tuple[bytes, dict[bytes, bytes]]]


def entries_of(answer: Any) -> Entries:
    """Of one stream, out of what XREAD answers."""
    return cast("Entries", answer[0][1]) if answer else []
