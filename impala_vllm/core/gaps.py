"""When will a silent trace speak again? A survival curve, learned online, never a fixed TTL.

Gaps fall into bins that grow by sqrt(2). A bin's hazard (the chance to resume there, given silence
until there) is learned for the population, for each tool signature and for each trace's gaps after
that signature, each level shrunk towards the one above. Traces that are silent now count as at risk
(right censoring), so that traces which never return lower the hazard of long silences while they are
still being waited for. They fade like everything else: a server that runs for days is full of ended agents.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

from impala_vllm.core.types import TraceId

SHORTEST_S = 0.01
LEAST_WEIGHT = 1e-3
"""An open gap that counts for less is passed over."""
NUM_BINS = 44  # 0.01 s * 2^(43/2) is some eight hours: past any lease
EDGES_S = tuple(SHORTEST_S * 2 ** (i / 2) for i in range(NUM_BINS - 1))


_CHILDREN, _DRAINED = "\0children", "\0drained"
"""Signatures of a wait for children, and of the one behind the last of them. No tool is called so."""


@dataclass(frozen=True, slots=True)
class GapConfig:
    """Priors and memory of the gap forecast. Counts are in observed gaps."""

    prior_hazard: float = 0.2
    """Chance to resume within a bin before anything was seen: a median two octaves wide."""
    prior_weight: float = 2.0
    """Gaps the prior counts for."""
    signature_weight: float = 2.0
    """Gaps the population counts for when a signature is scored."""
    trace_weight: float = 16.0
    """Gaps the level above counts for when a trace is scored: most traces are short."""
    memory: float = 400.0
    """Gaps after which an observation's weight has fallen to 1/e: workloads drift within minutes."""
    stale_s: float = 30.0
    """Age at which a silent trace's curve is built anew when asked for: bounds the cost at 2,000 traces."""
    max_signatures: int = 512
    """Signatures remembered; the least recently seen goes first. A tool set has tens."""
    max_trace_signatures: int = 8
    """The same of one trace: its counts take a kilobyte each."""


class GapForecast:
    """Learns from finishes and resumes; answers for traces that are silent.

    A trace is in at most one gap. Unknown traces: no-op on the way in, None on the way out.
    Cost: O(bins) for a resume, O(log bins) for most questions; `refresh` is O(silent traces).
    """

    def __init__(self, config: GapConfig | None = None) -> None:
        self.config = config or GapConfig()
        self._population = _Counts(self.config.memory)
        self._signatures: dict[str, _Counts] = {}
        self._traces: dict[TraceId, dict[str | None, _Counts]] = {}
        """By signature; None: all of the trace's gaps."""
        self._gaps: dict[TraceId, _Gap] = {}
        self._hazards = [self.config.prior_hazard] * NUM_BINS
        self._open: dict[str, list[float]] = {}
        """Gaps that are still open, by signature and bin; as old as the last refresh."""
        self._shared: dict[str | None, tuple[list[float], list[float]]] = {}
        """Hazards and curve by signature, for traces without gaps of their own; as old as the last refresh."""

    def finish(self, trace_id: TraceId, now: float, signature: str | None = None) -> None:
        """The trace went silent after a turn that called `signature` (None: unknown)."""
        gap = self._gaps[trace_id] = _Gap(now, signature)
        gap.seen = self._population.num_added

    def resume(self, trace_id: TraceId, now: float) -> float | None:
        """The trace spoke again. Returns the gap in seconds, None when it was not silent."""
        gap = self._gaps.pop(trace_id, None)
        if gap is None:
            return None
        length_s = max(0.0, now - gap.started_s)
        index = _bin(length_s)
        self._population.add(index)
        if gap.signature is not None:
            self._signature(gap.signature).add(_bin(max(0.0, now - gap.since_s)))
        mine = self._traces.setdefault(trace_id, {})
        for signature, since_s in {None: gap.started_s, gap.signature: gap.since_s}.items():
            counts = mine.pop(signature, None) or _Counts(self.config.memory)
            counts.add(_bin(max(0.0, now - since_s)))
            mine[signature] = counts
        if len(mine) > self.config.max_trace_signatures + 1:
            del mine[next(name for name in mine if name is not None)]
        return length_s

    def delegate(self, trace_id: TraceId) -> None:
        """A child of the silent trace has begun: it waits for children now, whatever it called."""
        gap = self._gaps.get(trace_id)
        if gap is not None and gap.signature != _CHILDREN:
            gap.signature, gap.since_s, gap.curve = _CHILDREN, gap.started_s, None

    def drain(self, trace_id: TraceId, now: float) -> None:
        """The last child of the silent trace has ended: it speaks when that has reached it."""
        gap = self._gaps.get(trace_id)
        if gap is not None and gap.signature == _CHILDREN:
            self._signature(_CHILDREN).add(_bin(max(0.0, now - gap.since_s)))
            gap.signature, gap.since_s, gap.curve = _DRAINED, now, None

    def forget(self, trace_id: TraceId) -> None:
        """The trace is gone from the table; its open gap counts as never resumed."""
        gap = self._gaps.pop(trace_id, None)
        if gap is not None:
            weight = self._weight(gap)
            self._population.censor(NUM_BINS - 1, weight)
            if gap.signature is not None:
                self._signature(gap.signature).censor(NUM_BINS - 1, weight)
        self._traces.pop(trace_id, None)

    def refresh(self, now: float) -> None:
        """Re-learn the hazards from every gap so far, the open ones included. Call about once a second."""
        open_at = [0.0] * NUM_BINS
        self._open.clear()
        for gap in self._gaps.values():
            weight = self._weight(gap)
            if weight < LEAST_WEIGHT:
                continue
            index = bisect_right(EDGES_S, now - gap.started_s)
            open_at[index] += weight
            if gap.signature is not None:
                of_signature = self._open.get(gap.signature)
                if of_signature is None:
                    of_signature = self._open[gap.signature] = [0.0] * NUM_BINS
                if gap.since_s != gap.started_s:
                    index = bisect_right(EDGES_S, now - gap.since_s)
                of_signature[index] += weight
        prior = [self.config.prior_hazard] * NUM_BINS
        self._hazards = self._population.hazards(prior, self.config.prior_weight, open_at)
        self._shared.clear()

    def median_remaining_s(self, trace_id: TraceId, now: float) -> float | None:
        """Seconds by which a silent trace resumes with even odds, given its silence so far.

        `math.inf` where it more likely never resumes; None when it is not silent.
        """
        return self.quantile_remaining_s(trace_id, 0.5, now)

    def quantile_remaining_s(self, trace_id: TraceId, chance: float, now: float) -> float | None:
        """Seconds by which a silent trace resumes with this chance, given its silence so far; else as the median."""
        gap = self._gaps.get(trace_id)
        if gap is None:
            return None
        curve = self._fresh_curve(trace_id, gap, now)
        idle_s = max(0.0, now - gap.since_s)
        return max(0.0, _when(curve, _cumulative(curve, idle_s) - math.log1p(-chance)) - idle_s)

    def usual_s(self, trace_id: TraceId) -> float:
        """Median of a gap that the trace has yet to begin, whatever it will call."""
        return _when(self._curve(trace_id, None), math.log(2.0))

    def chance_within(self, trace_id: TraceId, within_s: float, now: float) -> float | None:
        """P(resume within `within_s` | silence so far); None when it is not silent."""
        gap = self._gaps.get(trace_id)
        if gap is None:
            return None
        curve = self._fresh_curve(trace_id, gap, now)
        idle_s = max(0.0, now - gap.since_s)
        return 1.0 - math.exp(_cumulative(curve, idle_s) - _cumulative(curve, idle_s + within_s))

    def silent_s(self, trace_id: TraceId, now: float) -> float | None:
        """Seconds since the trace went silent; None when it is not silent."""
        gap = self._gaps.get(trace_id)
        return None if gap is None else max(0.0, now - gap.started_s)

    def _weight(self, gap: "_Gap") -> float:
        """What an open gap counts for: as much as one that ended when it began."""
        return math.exp((gap.seen - self._population.num_added) / self.config.memory)

    def _signature(self, signature: str) -> "_Counts":
        counts = self._signatures.pop(signature, None) or _Counts(self.config.memory)
        self._signatures[signature] = counts
        if len(self._signatures) > self.config.max_signatures:
            del self._signatures[next(iter(self._signatures))]
        return counts

    def _fresh_curve(self, trace_id: TraceId, gap: "_Gap", now: float) -> list[float]:
        if gap.curve is None or now - gap.drawn_s > self.config.stale_s:
            gap.curve, gap.drawn_s = self._curve(trace_id, gap.signature), now
        return gap.curve

    def _curve(self, trace_id: TraceId, signature: str | None) -> list[float]:
        shared = self._shared.get(signature)
        if shared is None:
            counts = self._signatures.get(signature) if signature is not None else None
            hazards = self._hazards
            if counts is not None and signature is not None:
                hazards = counts.hazards(hazards, self.config.signature_weight, self._open.get(signature))
            shared = self._shared[signature] = hazards, _integrated(hazards)
        counts = self._traces.get(trace_id, _NO_COUNTS).get(signature)
        return shared[1] if counts is None else _integrated(counts.hazards(shared[0], self.config.trace_weight))


class _Gap:
    __slots__ = ("curve", "drawn_s", "seen", "signature", "since_s", "started_s")

    def __init__(self, started_s: float, signature: str | None) -> None:
        self.started_s = self.since_s = started_s
        """`since_s`: from when its signature counts; later where children have ended meanwhile."""
        self.signature = signature
        self.seen = 0
        """Gaps of the population that had ended before it."""
        self.curve: list[float] | None = None
        """Cumulative hazard at the lower edge of each bin; one longer than the bins. Drawn when asked for."""
        self.drawn_s = started_s


class _Counts:
    """Exponentially forgotten counts of gaps by bin: ended by a resume, or given up on."""

    __slots__ = ("_censored", "_decay", "_resumed", "num_added")

    def __init__(self, memory: float) -> None:
        self.num_added = 0
        self._decay = math.exp(-1.0 / memory)
        self._resumed = [0.0] * NUM_BINS
        self._censored = [0.0] * NUM_BINS

    def add(self, index: int) -> None:
        decay = self._decay
        self._resumed = [n * decay for n in self._resumed]
        self._censored = [n * decay for n in self._censored]
        self._resumed[index] += 1.0
        self.num_added += 1

    def censor(self, index: int, weight: float) -> None:
        """One was given up on, that counted for `weight` while it was waited for."""
        self._censored[index] += weight

    def hazards(self, above: list[float], weight: float, open_at: list[float] | None = None) -> list[float]:
        """Hazard by bin, shrunk towards `above` as if `weight` gaps had been seen there."""
        found: list[float] = []
        at_risk = 0.0
        columns = (self._resumed, self._censored, open_at or _NONE_OPEN, above)
        for resumed, censored, still_open, prior in zip(*map(reversed, columns), strict=True):
            # A gap that ends or stands in this bin was at risk for half of it on average.
            here = resumed + at_risk + 0.5 * (censored + still_open)
            found.append((resumed + weight * prior) / (here + weight))
            at_risk += resumed + censored + still_open
        found.reverse()
        return found


_NO_COUNTS: dict[str | None, _Counts] = {}
_NONE_OPEN = [0.0] * NUM_BINS


def _bin(length_s: float) -> int:
    return bisect_right(EDGES_S, length_s)


def _integrated(hazards: list[float]) -> list[float]:
    """Cumulative hazard at the lower edge of each bin, and at the end."""
    curve = [0.0]
    for hazard in hazards:
        curve.append(curve[-1] - math.log1p(-min(hazard, 0.999)))
    return curve


def _cumulative(curve: list[float], at_s: float) -> float:
    """Cumulative hazard at `at_s`, linear inside a bin."""
    index = _bin(at_s)
    if index >= NUM_BINS - 1:
        return curve[NUM_BINS - 1]
    low = EDGES_S[index - 1] if index else 0.0
    share = (at_s - low) / (EDGES_S[index] - low)
    return curve[index] + share * (curve[index + 1] - curve[index])


def _when(curve: list[float], cumulative: float) -> float:
    """The time at which the curve reaches `cumulative`; the inverse of `_cumulative`."""
    index = bisect_right(curve, cumulative) - 1
    if index >= NUM_BINS - 1:
        return math.inf
    low = EDGES_S[index - 1] if index else 0.0
    return low + (EDGES_S[index] - low) * (cumulative - curve[index]) / (curve[index + 1] - curve[index])
