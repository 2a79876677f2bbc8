"""vLLM's block hashes without vLLM: the same bytes for the same tokens, salt, adapter and media.

A block is hashed with its predecessor, so a hash stands for the whole prefix. The rules are those of vLLM 0.32
(`v1/core/kv_cache_utils.py`); its handshake says which algorithm and seed a server uses, and proves it by an example.
"""

import hashlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import xxhash

from impala_vllm.fleet.places import BlockKey, key_of

HashFunction = Callable[[object], bytes]

ExtraKeys = tuple[tuple[Any, ...], ...]
"""What beside its tokens decides a block's KV, as vLLM tags it."""


class SchemeError(ValueError):
    """Hashes of this kind cannot be computed here; one line."""


class Adapter(NamedTuple):
    """A LoRA adapter: the path counts, so that a name that was given to another adapter is no hit."""

    name: str
    path: str


class Chain(NamedTuple):
    """Hashes of the full blocks of a prompt."""

    keys: list[BlockKey]
    last: bytes | None
    """The last one in full, to go on from; None before the first block."""


class Scheme:
    """One server's way of hashing. Immutable, so threads may share it."""

    def __init__(self, algorithm: str, none_hash: bytes, block_tokens: int) -> None:
        """`none_hash` stands in front of the first block. Raises SchemeError."""
        if block_tokens < 1:
            raise SchemeError(f"blocks of {block_tokens} tokens; there must be one or more in each")
        self.algorithm = algorithm
        self.none_hash = none_hash
        self.block_tokens = block_tokens
        self._hash = function(algorithm)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scheme) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, bytes, int]:
        return self.algorithm, self.none_hash, self.block_tokens

    def chain(
        self,
        tokens: Sequence[int],
        before: bytes | None = None,
        salt: str | None = None,
        adapter: Adapter | None = None,
    ) -> Chain:
        """Hash the full blocks of `tokens`, which follow the block hashed `before`. 2 microseconds a block."""
        keys: list[BlockKey] = []
        size, last, make = self.block_tokens, before, self._hash
        always = (("lora", *adapter),) if adapter is not None else ()
        extra: ExtraKeys | None = (*always, ("cache_salt", salt)) if salt and before is None else always or None
        for start in range(0, len(tokens) - size + 1, size):
            last = make((last if last is not None else self.none_hash, tuple(tokens[start : start + size]), extra))
            keys.append(key_of(last))
            extra = always or None
        return Chain(keys, last)

    def block(self, before: bytes | None, tokens: Sequence[int], extra: ExtraKeys | None) -> bytes:
        """The hash of one block with whatever extra keys it has."""
        return self._hash((before if before is not None else self.none_hash, tuple(tokens), extra))


def function(algorithm: str) -> HashFunction:
    """vLLM's hash function of that name. Raises SchemeError."""
    if algorithm not in _PARTS:
        raise SchemeError(f"unknown hash algorithm {algorithm!r}; known are {', '.join(_PARTS)}")
    serialise, digest = _PARTS[algorithm]
    return lambda value: digest(serialise(value))


def _pickled(value: object) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def _cbor(value: object) -> bytes:
    try:
        import cbor2
    except ImportError as e:
        raise SchemeError("hashes over CBOR need cbor2; `pip install cbor2`") from e
    return cbor2.dumps(value, canonical=True)


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


_PARTS: dict[str, tuple[Callable[[object], bytes], Callable[[bytes], bytes]]] = {
    "sha256": (_pickled, _sha256),
    "sha256_cbor": (_cbor, _sha256),
    "xxhash": (_pickled, xxhash.xxh3_128_digest),
    "xxhash_cbor": (_cbor, xxhash.xxh3_128_digest),
}
