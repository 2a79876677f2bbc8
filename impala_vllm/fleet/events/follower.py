"""Follows the numbered batches of one publisher: no gap, no batch twice, no two lives of it mixed up.

A publisher counts from 0 and starts again with its engine; ZeroMQ drops what a slow subscriber does not
take. Whatever looks odd is settled by a replay that begins at the last batch applied: if that comes back
unchanged, it is the same life. What cannot be settled is lost: the sink forgets the replica, and what
follows is true but incomplete, until a snapshot of the engine makes it whole. No sockets here, see `feed`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import xxhash

from impala_vllm.fleet.events.snapshot import Snapshot
from impala_vllm.fleet.events.wire import Batch, Cleared, Event, Stored, WireError, decode
from impala_vllm.fleet.places import Tier

MAX_REMEMBERED = 10_000
"""Batches that may come while a snapshot is read; with more it is read again."""
BLOCKS_AT_ONCE = 2000
"""Of a snapshot: some 2 ms, after which others of the event loop get their turn."""


class Sink(Protocol):
    """Where a replica's events go."""

    def apply(self, events: Sequence[Event]) -> None:
        """Take over changes, in order."""
        ...

    def lost(self) -> None:
        """Forget all that was said of the replica: part of it may have changed unheard."""
        ...


class Completeness(Enum):
    """What is known of a replica."""

    NOTHING = "nothing"
    """No event so far, or none since a loss."""
    UNSURE = "unsure"
    """What is known may have changed unheard: nothing came since the connection was lost."""
    PART = "part"
    """What is known is true, but blocks may be held that we never heard of."""
    HBM = "hbm"
    """All that HBM holds; what lies below it only since then."""
    ALL = "all"
    """Every event since the engine started."""


@dataclass(slots=True)
class Counts:
    """What was followed so far."""

    batches: int = 0
    duplicates: int = 0
    replays: int = 0
    epochs: int = 0
    """Lives of the publisher after the first."""
    losses: int = 0
    snapshots: int = 0
    undecodable: int = 0
    unknown_events: int = 0


class Question(NamedTuple):
    """A replay to ask for."""

    from_seq: int
    checks: bool = False
    """The first batch of the answer must be the last one applied."""


class Follower:
    """One publisher. Its owner delivers `live` batches; where `question` is set it asks that before any further one.

    An answer is `asked`, `replayed` for each batch, then `replay_ended` or `replay_failed`; it may ask again. Where it
    `has_work` its owner calls `work`, again and again and whenever it likes: what comes meanwhile waits behind that.
    """

    def __init__(self, sink: Sink, can_replay: bool) -> None:
        self._sink = sink
        self._can_replay = can_replay
        self.counts = Counts()
        self._known = Completeness.NOTHING
        self._is_connected = self._is_sure = True
        self.next_seq: int | None = None
        """The batch that should come next; None where whatever comes is taken."""
        self.question: Question | None = Question(0) if can_replay else None
        self._answering = Question(0)
        self._num_answers = 0
        self._is_other_life = False
        self._has_asked_all = False
        """In this life; where that was in vain, what comes is taken as it comes."""
        self._asked_at: int | None = None
        """`next_seq` when the replay began."""
        self._highest = -1
        """The highest number seen in this life."""
        self._last_print: int | None = None
        self._last_written_s = float("-inf")
        self._is_incomplete = False
        self._remembered: list[tuple[float, list[Event]]] | None = None
        """Batches since a snapshot was asked for: changes of HBM."""
        self._snapshot: Snapshot | None = None
        """It has come, but the batch that marks its moment has not."""
        self._work: deque[Event] = deque()
        """A snapshot that is being applied, and all that has come since its moment."""

    @property
    def completeness(self) -> Completeness:
        """What is known, and whether it can be relied on now."""
        return self._known if self._is_sure or not self.knows else Completeness.UNSURE

    @property
    def knows(self) -> bool:
        """Something that was said is believed, sure or not."""
        return self._known is not Completeness.NOTHING

    @property
    def wants_snapshot(self) -> bool:
        """It is incomplete, no snapshot is on its way, and the batch that marks its moment can come."""
        return self._is_incomplete and self._remembered is None and self._is_connected and not self._work

    @property
    def is_incomplete(self) -> bool:
        """Something was missed that no replay brings back."""
        return self._is_incomplete

    def snapshot_begins(self) -> None:
        """One is being asked for; `snapshot_came` or `snapshot_failed` follows."""
        self._remembered, self._snapshot = [], None

    def snapshot_came(self, snapshot: Snapshot) -> None:
        """It counts as soon as the batch that marks its moment has been applied."""
        if self._remembered is not None:
            self._snapshot = snapshot
            self._take_snapshot()

    def snapshot_failed(self) -> None:
        """Another one may be asked for."""
        self._remembered = self._snapshot = None

    @property
    def has_work(self) -> bool:
        """A snapshot is being applied."""
        return bool(self._work)

    def work(self) -> None:
        """Apply the next part of it."""
        events: list[Event] = []
        num_blocks = 0
        while self._work and num_blocks < BLOCKS_AT_ONCE:
            event = self._work.popleft()
            events.append(event)
            num_blocks += 0 if isinstance(event, Cleared) else len(event.keys)
        self._sink.apply(events)
        if not self._work:
            self._known, self._is_incomplete = Completeness.HBM, False
            self.counts.snapshots += 1

    def live(self, seq: int, payload: bytes) -> None:
        """The publisher sent a batch."""
        expected = self.next_seq
        if expected is None and seq > 0 and self._can_replay and not self._has_asked_all:
            self._has_asked_all = True
            self._highest = seq
            self.question = Question(0)
        elif expected is None or seq == expected:
            self._apply(seq, payload)
        elif seq < expected and self._is_old(payload):
            self.counts.duplicates += 1
        elif self._can_replay:
            self._highest = seq
            self.question = Question(max(0, expected - 1), checks=expected > 0)
        else:
            self._lose(other_life=seq < expected)
            self._apply(seq, payload)

    def disconnected(self) -> None:
        """There is no connection, not yet or no longer; what is known is unsure until `reconnected` and a replay."""
        self._is_connected = self._is_sure = False

    def forget(self) -> None:
        """It has been unsure for too long: nothing is believed any more."""
        self._lose(other_life=False)
        self._highest, self._has_asked_all = -1, False  # by then it may be another life

    def reconnected(self) -> None:
        """The connection is a new one: the publisher may be too, and may even go on at the very number expected."""
        self._is_connected = True
        self._is_sure = not self._can_replay  # where it can, once that has ended
        if self.next_seq is None:
            if self._can_replay:  # it could not be asked before
                self.question = Question(0)
            return
        if self._can_replay:
            self.question = Question(max(0, self.next_seq - 1), checks=self.next_seq > 0)
        else:
            self._lose(other_life=False)

    def asked(self) -> Question:
        """The question is on its way."""
        assert self.question is not None
        self._answering, self.question = self.question, None
        self._num_answers, self._is_other_life = 0, False
        self._asked_at = self.next_seq
        self.counts.replays += 1
        return self._answering

    def replayed(self, seq: int, payload: bytes) -> None:
        """One batch of the answer."""
        self._num_answers += 1
        if self._num_answers == 1 and self._answering.checks:
            if seq != self._answering.from_seq:  # the publisher's memory does not go back so far
                self._lose(other_life=False)
            elif xxhash.xxh3_64_intdigest(payload) == self._last_print:
                return
            else:
                self._lose(other_life=True)
                self._is_other_life = True
        self._highest = max(self._highest, seq)
        if not self._is_other_life and self.next_seq in (None, seq):
            self._apply(seq, payload)
        # What else comes is known already, or stands behind a hole: a ROUTER that is full drops without a word.

    def replay_ended(self) -> None:
        """The publisher said that this was all."""
        if self._answering.checks and self._num_answers == 0:  # it has not got so far yet: it counts anew
            self._lose(other_life=True)
            self._is_other_life = True
        if self._is_other_life:
            self._has_asked_all = True
            self.question = Question(0)
        elif self.next_seq is not None and self.next_seq <= self._highest:
            if self.next_seq == self._asked_at:
                self._lose(other_life=False)
            else:
                self.question = Question(max(0, self.next_seq - 1), checks=self.next_seq > 0)
        self._settle()

    def replay_failed(self) -> None:
        """No answer, or not all of it, in time."""
        if self.next_seq is not None:
            self._lose(other_life=False)
        self._settle()

    def _settle(self) -> None:
        """A replay is over: what is known now is sure, where nothing else is to be asked."""
        self._is_sure = self._is_connected and self.question is None

    def _apply(self, seq: int, payload: bytes) -> None:
        self.next_seq = seq + 1
        self._highest = max(self._highest, seq)
        self._last_print = xxhash.xxh3_64_intdigest(payload)
        batch = self._decoded(payload)
        if batch is None:  # it may have told of removals
            self._sink.lost()
            self._work.clear()
            self._known, self._is_incomplete = Completeness.PART, True
            self.snapshot_failed()
            return
        if not self.knows:
            self._known = Completeness.ALL if seq == 0 else Completeness.PART
            self._is_incomplete = seq > 0
        self._last_written_s = batch.written_s
        self.counts.batches += 1
        self.counts.unknown_events += batch.num_unknown
        if self._work:
            self._work += batch.events
        else:
            self._sink.apply(batch.events)
        if self._remembered is not None:
            changes = [event for event in batch.events if isinstance(event, Cleared) or event.tier is Tier.HBM]
            self._remembered.append((batch.written_s, changes))
            if self._snapshot is not None:
                self._take_snapshot()
            elif len(self._remembered) > MAX_REMEMBERED:
                self.snapshot_failed()

    def _take_snapshot(self) -> None:
        """HBM as the snapshot says, and what has changed since; where its moment has come."""
        assert self._remembered is not None
        assert self._snapshot is not None
        moments = [
            number for number, (written_s, _) in enumerate(self._remembered) if written_s == self._snapshot.written_s
        ]
        if not moments:
            return
        since = [event for _, events in self._remembered[moments[-1] + 1 :] for event in events]
        self._work += [Cleared(), *_parts(self._snapshot), *since]
        self._known, self._is_incomplete = Completeness.PART, True
        self.snapshot_failed()

    def _is_old(self, payload: bytes) -> bool:
        batch = self._decoded(payload)
        return batch is None or batch.written_s <= self._last_written_s

    def _decoded(self, payload: bytes) -> Batch | None:
        try:
            return decode(payload)
        except WireError:
            self.counts.undecodable += 1
            return None

    def _lose(self, other_life: bool) -> None:
        self._sink.lost()
        self._work.clear()
        self._known = Completeness.NOTHING
        self.next_seq, self._last_print = None, None
        self.snapshot_failed()
        self._is_incomplete = not other_life
        self._last_written_s = float("-inf")
        if other_life:
            self._highest, self._has_asked_all = -1, False
            self.counts.epochs += 1
        else:
            self.counts.losses += 1


def _parts(snapshot: Snapshot) -> Iterator[Stored]:
    for tier, keys, group in snapshot.stored:
        for start in range(0, len(keys), BLOCKS_AT_ONCE):
            yield Stored(tier, keys[start : start + BLOCKS_AT_ONCE], group)
