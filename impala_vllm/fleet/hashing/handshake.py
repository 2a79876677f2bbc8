"""What a server says of itself before its hashes are believed, and whether that can work.

Served by impala's middleware at /impala/hello. A server that hashes otherwise than the router never matches
anything, silently: so each proves its way by an example, and what cannot match is refused with a reason.
"""

from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from impala_vllm.fleet.hashing.scheme import Scheme, SchemeError

VERSION = 1
PROBE_SALT = "impala"
EXCLUDES_TOOLS = "no tools where tool_choice is none"
"""A setting, for `chats_of`, that is followed here: --exclude-tools-when-tool-choice-none."""


class Group(msgspec.Struct, frozen=True):
    """A KV cache group: layers that share a block table."""

    block_tokens: int
    kind: str
    """As vLLM names its kinds of attention: full_attention, sliding_window, mamba..."""


class EventsAt(msgspec.Struct, frozen=True):
    """Where KV events are published."""

    endpoint: str
    """As the server bound it: a `*` stands for its host."""
    replay_endpoint: str | None = None
    topic: str = ""


class Rank(msgspec.Struct, frozen=True):
    """One engine of a server."""

    dp_rank: int
    epoch: str
    """Another one after every start of the engine."""
    algorithm: str
    none_hash: str
    """Hex; what stands in front of the first block."""
    block_tokens: int
    """Tokens a hash."""
    groups: list[Group]
    probe: list[str]
    """Hex; the hashes of two blocks of the tokens 0, 1, 2, ... with the cache salt `PROBE_SALT`."""
    events: EventsAt | None = None
    """None: events are off."""
    hbm_tokens: int | None = None
    """Room for KV."""
    integer_hashes: bool = False
    """Of no consequence here: keys are the same. Kept for people who look."""


class Hello(msgspec.Struct, frozen=True):
    """A server's answer."""

    version: int
    vllm_version: str
    model: str
    tokenizer: str
    dtype: str
    max_model_len: int
    ranks: list[Rank]
    revision: str | None = None
    has_prefix_caching: bool = True
    chats: str | None = None
    """How it renders chats, see `chats_of`; None: it does not say."""


class HelloError(ValueError):
    """Not a handshake; one line."""


def read(body: bytes) -> Hello:
    """Raises HelloError."""
    try:
        hello = msgspec.json.decode(body, type=Hello)
    except msgspec.DecodeError as e:
        raise HelloError(f"not a handshake ({e})") from e
    if hello.version != VERSION:
        raise HelloError(f"handshake of version {hello.version}, {VERSION} is spoken here; use one version of impala")
    return hello


def scheme_of(hello: Hello) -> Scheme:
    """The server's way of hashing. Raises HelloError where it cannot be followed, with what to do."""
    if not hello.has_prefix_caching:
        raise HelloError("prefix caching is off; start the server with --enable-prefix-caching")
    if not hello.ranks:
        raise HelloError("no engine answered; see its /impala/health")
    schemes = [_scheme(rank) for rank in hello.ranks]
    if len(set(schemes)) > 1:
        raise HelloError("its ranks hash differently from each other; set PYTHONHASHSEED, or use sha256")
    return schemes[0]


def group_of(hello: Hello) -> int:
    """The group whose blocks stand for a prefix: the first with full attention, which keeps all of them.

    Raises HelloError where blocks of that group are longer than what is hashed: not supported yet.
    """
    groups = hello.ranks[0].groups
    index = next((i for i, group in enumerate(groups) if "full" in group.kind), 0)
    if groups and groups[index].block_tokens != hello.ranks[0].block_tokens:
        raise HelloError(
            f"blocks of {groups[index].block_tokens} tokens, but hashes of {hello.ranks[0].block_tokens}: such hybrid "
            "models are routed by load alone"
        )
    return index


def differences(ours: Hello, theirs: Hello) -> list[str]:
    """Why two servers do not serve the same KV for the same prompt, one line each; empty where they do."""
    fields = ("model", "revision", "dtype", "vllm_version")
    lines = [
        f"{name}: {getattr(theirs, name)} here, {getattr(ours, name)} there"
        for name in fields
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if scheme_of(ours) != scheme_of(theirs):
        lines.append(
            "other hashes: set the same --prefix-caching-hash-algo, --block-size and PYTHONHASHSEED everywhere"
        )
    return lines


def chats_of(template: str, *settings: object) -> str:
    """A digest of a chat template, and of settings other than vLLM's defaults that change what it makes of a chat."""
    return blake2b(repr((template, *settings)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def probe(scheme: Scheme) -> list[str]:
    """What `Rank.probe` is by our own rules."""
    tokens = list(range(2 * scheme.block_tokens))
    size = scheme.block_tokens
    first = scheme.block(None, tokens[:size], (("cache_salt", PROBE_SALT),))
    return [first.hex(), scheme.block(first, tokens[size:], None).hex()]


def _scheme(rank: Rank) -> Scheme:
    try:
        scheme = Scheme(rank.algorithm, bytes.fromhex(rank.none_hash), rank.block_tokens)
        expected: Sequence[str] = probe(scheme)
    except (SchemeError, ValueError) as e:
        raise HelloError(f"rank {rank.dp_rank}: {e}") from e
    if list(expected) != rank.probe:
        raise HelloError(
            f"rank {rank.dp_rank}: it hashes otherwise than this version of impala expects; see docs/router.md for the "
            "versions of vLLM that are known"
        )
    return scheme
