"""What a ledger holds, line by line: a header when a server opens the file, then one record a trace.

JSON objects with a `kind` and a version; fields that are zero or unknown are left out. Names of people and sessions
are digests, prompts are not there at all. Counts of a trace are cumulative: of two records the later one counts.
"""

import hashlib
from enum import IntEnum

import msgspec

VERSION = 1
"""Of the records; one that names none is of version 1. A reader skips and counts what is newer."""


class Phase(IntEnum):
    """What a turn is doing. While several turns of a trace are open, the furthest one says what the trace does."""

    HOLD = 0
    """Kept back by admission."""
    QUEUE = 1
    """Waits for a place, after a preemption too."""
    LOAD = 2
    """Its KV comes from a tier below HBM."""
    PREFILL = 3
    DECODE = 4


class Header(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="server"):
    """Written whenever a server opens the file: what the records after it were made on."""

    run: str
    """Names this start of this engine; traces are called RUN/t1, RUN/t2..."""
    at: float
    """Unix time."""
    v: int = 1
    impala: str = ""
    mode: str = ""
    model: str = ""
    """Digest of the served model's name."""
    device: str = ""
    """What its driver calls the device: prices are looked up by it."""
    rank: int = 0
    gpus: int = 1
    """Devices of this engine: its share of the machine is charged by it."""
    block: int = 0
    """Tokens of a block of the engine's hashes."""
    hbm: int = 0
    """Tokens of KV that fit into HBM."""
    host: int = 0
    nvme: int = 0


class Tokens(msgspec.Struct, omit_defaults=True, gc=False):
    """Tokens of the finished turns, children of `n > 1` requests each counted, as vLLM counts them.

    computed + hbm + host + nvme + other = prompt tokens.
    """

    computed: int = 0
    hbm: int = 0
    host: int = 0
    nvme: int = 0
    other: int = 0
    """From a connector that does not say which tier, or from another machine."""
    output: int = 0

    @property
    def prompt(self) -> int:
        """All of the prompts."""
        return self.computed + self.hbm + self.host + self.nvme + self.other


class Again(msgspec.Struct, omit_defaults=True, gc=False):
    """Tokens computed although they had been before, by cause."""

    evicted: int = 0
    """Sent before in this namespace, and in no tier by the time they were asked for."""
    rewritten: int = 0
    """The prompt no longer begins as the turn before it did."""
    bypassed: int = 0
    """Sent before, and the request asked for no cache (prompt logprobs)."""
    preempted: int = 0
    """Computed before the turn was preempted. vLLM's counters do not have them, nor has `Tokens.computed`."""


class Stall(msgspec.Struct, omit_defaults=True, gc=False):
    """Seconds in which at least one turn was open, by what the furthest one was doing."""

    hold: float = 0.0
    queue: float = 0.0
    load: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0

    @property
    def total(self) -> float:
        """What a server can change of the completion time."""
        return self.hold + self.queue + self.load + self.prefill + self.decode


Row = tuple[int, int, int, int, int, int]


class Record(msgspec.Struct, omit_defaults=True, tag_field="kind", tag="trace"):
    """One trace so far."""

    trace: str
    start: float
    """Unix time of the first arrival."""
    end: float
    """Of the last turn's end; of the record, while one is open."""
    v: int = 1
    live: bool = False
    """More may come. A finished trace that goes on gets another record."""
    parent: str | None = None
    session: str | None = None
    """Digest of what the client calls it."""
    tenant: str | None = None
    turns: int = 0
    """Finished ones."""
    sources: dict[str, int] = {}
    """Turns by how identity knew whose they were."""
    confidence: float = 1.0
    """The lowest of all its turns."""
    outcome: str = ""
    """As reported, else inferred: ended, truncated, aborted, error, abandoned; running or silent while live."""
    reported: bool = False
    """`outcome` came from the client."""
    score: float | None = None
    tokens: Tokens = msgspec.field(default_factory=Tokens)
    again: Again = msgspec.field(default_factory=Again)
    gpu_s: float = 0.0
    """Its share of the steps it was in, by scheduled tokens, times devices."""
    stall: Stall = msgspec.field(default_factory=Stall)
    gap_s: float = 0.0
    """Silence between turns: tools at work. end - start = stall + gaps."""
    longest_gap_s: float = 0.0
    gaps: int = 0
    preemptions: int = 0
    failures: int = 0
    """Turns that ended in an error or by the client going away."""
    stem: str | None = None
    """Digest of the shared prefix it opened with."""
    log: tuple[Row, ...] = ()
    """A row a turn: arrival and length in ms (from the start), prompt, output, known prefix in tokens, and how many
    rows back the turn it follows is (0: none). Left out beyond a bound and where the file's byte budget is spent."""

    @property
    def jct_s(self) -> float:
        """First arrival to last end."""
        return self.end - self.start


class Unlinked(msgspec.Struct, omit_defaults=True, tag_field="kind", tag="unlinked"):
    """What requests without a trace took: pooling, no prefix caching, identity switched off. Cumulative a run."""

    run: str
    end: float
    v: int = 1
    turns: int = 0
    tokens: Tokens = msgspec.field(default_factory=Tokens)
    gpu_s: float = 0.0


class Stored(Record, tag="trace", gc=False):
    """A record as it is read, a million in seconds: what has parts is left as it is until `whole` is asked for."""

    sources: msgspec.Raw = msgspec.Raw(b"{}")  # type: ignore[assignment]
    log: msgspec.Raw = msgspec.Raw(b"[]")  # type: ignore[assignment]

    def whole(self) -> Record:
        """With its parts. Raises msgspec.DecodeError where they are none."""
        fields = {name: getattr(self, name) for name in Record.__struct_fields__}
        return Record(**fields | {"sources": _decode_sources(self.sources), "log": _decode_rows(self.log)})


_decode_sources = msgspec.json.Decoder(dict[str, int]).decode
_decode_rows = msgspec.json.Decoder(tuple[Row, ...]).decode

Line = Header | Stored | Unlinked
"""What a reader finds."""


def digest(kind: str, name: str) -> str:
    """16 hex characters that stand for a name. Whoever has a list of names can find it there."""
    return hashlib.sha256(f"impala {kind}\0{name}".encode()).hexdigest()[:16]
