"""Scores identity against the recorded truth, request by request.

A link is a request and the one before it in the same trace. A predicted link is right when both
belong to the same true trace; F1 weighs wrong links against those missed.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from enum import Enum

from impala_vllm.core.types import Link, Source
from impala_vllm.workload.turn import Turn

MAX_PROMPTS = 8
"""Earlier prompts of a trace compared with the next one to say what kind of turn it is."""


class Kind(Enum):
    """What a request truly is, seen from the recorded truth alone."""

    START = "start"
    SUBAGENT_START = "subagent_start"
    RETRY = "retry"
    CONTINUATION = "continuation"
    ROLLBACK = "rollback"
    """It goes on from an earlier point of its own trace."""
    COMPACTION = "compaction"
    """It shares with its own trace only what it shares with others: a rewritten history, or another role."""


@dataclass(slots=True)
class Tally:
    """Right ones out of all."""

    right: int = 0
    total: int = 0

    def note(self, right: bool) -> None:
        """One more."""
        self.right += right
        self.total += 1

    def share(self) -> float | None:
        """None where there were none."""
        return self.right / self.total if self.total else None


@dataclass(slots=True)
class Parents:
    """Sub-agents attached to their parent."""

    right: int = 0
    wrong: int = 0
    missed: int = 0
    unasked: int = 0
    """Traces with a parent although the truth gives them none."""


@dataclass(slots=True)
class Score:
    """The figures; `note()` each request in order of arrival."""

    links: Tally = field(default_factory=Tally)
    """Predicted links."""
    true_links: int = 0
    exact: int = 0
    """Predicted links to the very request before."""
    followed: Tally = field(default_factory=Tally)
    """Requests named as the one before: right if of the same true trace, whatever the predicted one mixes."""
    by_source: defaultdict[Source, Tally] = field(default_factory=lambda: defaultdict(Tally))
    by_kind: defaultdict[Kind, Tally] = field(default_factory=lambda: defaultdict(Tally))
    confusion: Counter[tuple[Kind, Source]] = field(default_factory=Counter[tuple[Kind, Source]])
    _parents: dict[str, tuple[str | None, str | None]] = field(default_factory=dict[str, tuple[str | None, str | None]])
    """True trace -> (true name of the parent it was given, its true parent)."""
    _parents_at_start: dict[str, tuple[str | None, str | None]] = field(
        default_factory=dict[str, tuple[str | None, str | None]]
    )
    _last_of_predicted: dict[str, Turn] = field(default_factory=dict[str, Turn])
    _last_of_true: dict[str, Turn] = field(default_factory=dict[str, Turn])
    _prompts: defaultdict[str, list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    _owners: dict[int, str | None] = field(default_factory=dict[int, str | None])
    _traces: dict[str, str] = field(default_factory=dict[str, str])
    """Request -> true trace."""

    def note(self, turn: Turn, link: Link) -> None:
        """Count one request; those without ground truth are left out."""
        true = turn.trace_id
        if true is None:
            return
        kind = self._kind(turn, true)
        before = self._last_of_predicted.get(link.trace_id)
        right = before is not None and before.trace_id == true
        if kind not in (Kind.START, Kind.SUBAGENT_START):
            self.true_links += 1
            self.by_kind[kind].note(right)
        else:
            self.by_kind[kind].note(before is None)
        if before is not None:
            self.links.note(right)
            last = self._last_of_true.get(true)
            self.exact += last is not None and last.request_id == before.request_id
        if link.previous_request_id is not None:
            self.followed.note(self._traces.get(link.previous_request_id) == true)
        self.by_source[link.source].note(right if before is not None else kind in (Kind.START, Kind.SUBAGENT_START))
        self.confusion[kind, link.source] += 1
        self._note_parent(turn, link, first=kind in (Kind.START, Kind.SUBAGENT_START))
        self._last_of_predicted[link.trace_id] = turn
        self._last_of_true[true] = turn
        self._traces[turn.request_id] = true
        self._learn(turn.blocks, true)

    @property
    def precision(self) -> float:
        """Right among predicted links; 1 where none were predicted."""
        return self.links.right / self.links.total if self.links.total else 1.0

    @property
    def recall(self) -> float:
        """Found among true links; 1 where there are none."""
        return self.links.right / self.true_links if self.true_links else 1.0

    @property
    def link_f1(self) -> float:
        """Harmonic mean of the two."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0

    @property
    def exact_f1(self) -> float:
        """The same, where only the very request before counts."""
        both = self.links.total + self.true_links
        return 2 * self.exact / both if both else 1.0

    @property
    def predecessor_f1(self) -> float:
        """The same over the requests named as the one before."""
        both = self.followed.total + self.true_links
        return 2 * self.followed.right / both if both else 1.0

    def _note_parent(self, turn: Turn, link: Link, first: bool) -> None:
        """Remember what was last said of the true trace's parent, and what was said at its start."""
        parent = self._last_of_predicted.get(link.parent_trace_id) if link.parent_trace_id else None
        said = None if link.parent_trace_id is None else (parent.trace_id if parent else "")
        true = turn.trace_id or ""
        if first:
            self._parents_at_start[true] = (said, turn.parent_trace_id)
        self._parents[true] = (said, turn.parent_trace_id)

    @property
    def parents(self) -> Parents:
        """As of each trace's last request: later turns may correct the first."""
        return _judge(self._parents)

    @property
    def parents_at_start(self) -> Parents:
        """As of each trace's first request."""
        return _judge(self._parents_at_start)

    def _kind(self, turn: Turn, true: str) -> Kind:
        if true not in self._last_of_true:
            return Kind.START if turn.parent_trace_id is None else Kind.SUBAGENT_START
        prompts = self._prompts[true]
        if turn.blocks == self._last_of_true[true].blocks:
            return Kind.RETRY
        shared = [_shared(turn.blocks, prompt) for prompt in prompts]
        if any(depth >= len(prompt) - 1 for depth, prompt in zip(shared, prompts, strict=True)):
            return Kind.CONTINUATION
        return (
            Kind.ROLLBACK if max(shared, default=0) > self._shared_with_others(turn.blocks, true) else Kind.COMPACTION
        )

    def _shared_with_others(self, blocks: tuple[int, ...], true: str) -> int:
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if self._owners.get(blocks[middle], true) != true:
                low = middle + 1
            else:
                high = middle
        return low

    def _learn(self, blocks: tuple[int, ...], true: str) -> None:
        prompts = self._prompts[true]
        known = max((_shared(blocks, prompt) for prompt in prompts), default=0)
        prompts[:] = [p for p in prompts if _shared(blocks, p) < len(p)][-MAX_PROMPTS + 1 :]
        prompts.append(blocks)
        for block in blocks[known:]:
            # None: several traces hold it.
            self._owners[block] = true if self._owners.get(block, true) == true else None


def _judge(parents: dict[str, tuple[str | None, str | None]]) -> Parents:
    result = Parents()
    for said, true in parents.values():
        if true is None:
            result.unasked += said is not None
        elif said is None:
            result.missed += 1
        elif said == true:
            result.right += 1
        else:
            result.wrong += 1
    return result


def _shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Leading blocks in common. Ids are chained, so one comparison speaks for all before it. O(log n)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high) // 2
        if a[middle] == b[middle]:
            low = middle + 1
        else:
            high = middle
    return low
