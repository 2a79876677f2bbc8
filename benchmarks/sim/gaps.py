"""`python -m benchmarks.sim.gaps`: how good is the forecast of when a silent trace speaks again?

The shipped forecast learns online from recorded gaps, many sessions side by side, and is scored on each gap before it
sees how long it was: against the median of all gaps so far, the session's own, and a fixed time to live.
"""

import heapq
import math
import sys
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

import click
import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.record import Record
from impala_vllm.core.gaps import GapForecast
from impala_vllm.core.types import TraceId
from impala_vllm.replay.measures import mean
from impala_vllm.workload import WorkloadError
from impala_vllm.workload.read import load
from impala_vllm.workload.source import lines

LEVELS = tuple(i / 10 for i in range(1, 10))
MEDIAN = LEVELS.index(0.5)
EDGES_S = tuple(0.05 * 2 ** (i / 4) for i in range(77))
"""Where a forecast's curve is read, up to seven hours."""
TTL_S = 300.0
LEAST_S = 0.05
"""Shorter gaps are as long, in logarithms."""
REFRESH_S = 1.0
STEPS = 14
"""Of the search for the price of holding at which hits are equal."""


class _Row(msgspec.Struct):
    t: float
    type: str
    input_tokens: int = msgspec.field(name="in", default=0)
    stop: str = ""
    api_time: float | None = None


class _Recorded(msgspec.Struct):
    id: str
    requests: list[_Row]


@dataclass(frozen=True, slots=True)
class Gap:
    """After a turn. `length_s` None: it was the session's last."""

    start_s: float
    length_s: float | None
    tokens: int
    signature: str | None
    is_scored: bool


@dataclass(frozen=True, slots=True)
class Forecast:
    """What was said of a gap when it began."""

    gap: Gap
    quantiles_s: tuple[float, ...]
    """By `LEVELS`, given that it ends."""
    place: float
    """Share of gaps that end no later, as forecast."""
    curve: tuple[float, ...]
    """Chance to have ended by each of `EDGES_S`."""
    session_s: tuple[float, ...]
    global_s: tuple[float, ...]
    """By `LEVELS`, of all gaps that have ended; the session's before its first gap are the global ones."""


@click.command()
@click.option("--traces", type=click.Path(path_type=Path), envvar="IMPALA_TRACES", required=True)
@click.option("--live", type=click.IntRange(min=1), default=32, show_default=True, help="Sessions side by side.")
@click.option("--sessions", type=click.IntRange(min=1), help="The first so many only.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--name", default="kv-cache-tester", show_default=True, help="Of the log, for the record.")
@click.option("--no-record", is_flag=True, help="Do not add to benchmarks/results.")
def main(traces: Path, live: int, sessions: int | None, seed: int, name: str, no_record: bool) -> None:
    """Score the gap forecast on a log of sessions."""
    try:
        found = read(traces)[:sessions]
    except (WorkloadError, msgspec.DecodeError) as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(2)
    made = list(forecasts(found, live, Random(seed)))
    if not any(f.gap.is_scored and f.gap.length_s is not None for f in made):
        click.echo(f"error: {traces}: no session in it has gaps to score; give a log with finished turns", err=True)
        sys.exit(2)
    figures = score(made)
    console = Console()
    table = Table("figure", "value", title=f"{name}: {sum(f.gap.is_scored for f in made)} gaps scored")
    for label, value in figures.items():
        table.add_row(label, f"{value:.3f}")
    console.print(table)
    if not no_record:
        params = {"log": name, "sessions": len(found), "live at a time": live}
        Console(stderr=True).print(f"recorded in {record.append(_records(figures, params, len(made), seed))}")


def read(path: Path) -> list[list[Gap]]:
    """Gaps by session. kv-cache-tester rows that repeat a request are learned from and not scored."""
    if path.suffix == ".jsonl" and b'"hash_id_scope"' in path.open("rb").read(4096):
        decoder = msgspec.json.Decoder(_Recorded)
        return [_rows(decoder.decode(line.data)) for line in lines(path)]
    by_trace: dict[str, list[Gap]] = {}
    turns = [t for t in load(path) if t.finish_s is not None]
    for turn in turns:
        gaps = by_trace.setdefault(turn.trace_id or turn.request_id, [])
        assert turn.finish_s is not None
        if gaps:
            gaps[-1] = _ended(gaps[-1], max(0.0, turn.arrival_s - gaps[-1].start_s))
        signature = f"tool:{turn.tool}" if turn.tool else turn.outcome.value
        gaps.append(Gap(turn.finish_s, None, turn.input_tokens, signature, True))
    return list(by_trace.values())


def _ended(gap: Gap, length_s: float) -> Gap:
    return Gap(gap.start_s, length_s, gap.tokens, gap.signature, gap.is_scored)


def _rows(session: _Recorded) -> list[Gap]:
    rows = [r for r in session.requests if r.type in ("n", "s")]
    made: list[Gap] = []
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        start_s = row.t + (row.api_time or 0.0)
        length_s = None if after is None else max(0.0, after.t - start_s)
        made.append(Gap(start_s, length_s, row.input_tokens, row.stop or None, after is not None and after.type == "n"))
    return made


def forecasts(
    sessions: Sequence[Sequence[Gap]], live: int, rng: Random, forecast: GapForecast | None = None
) -> Iterator[Forecast]:
    """In the order in which gaps begin, those after last turns too. `forecast`: instead of a fresh one."""
    forecast, refreshed_s = forecast or GapForecast(), 0.0
    seen: list[float] = []
    of_session: dict[int, list[float]] = {}
    total_s = sum(s[-1].start_s - s[0].start_s for s in sessions)
    events: list[tuple[float, int, int, int, bool]] = []
    number = count()
    for index, session in enumerate(sessions):
        begins_s = rng.uniform(0.0, total_s / live)
        at_s = begins_s
        for place, gap in enumerate(session):
            at_s = max(at_s, begins_s + gap.start_s - session[0].start_s)
            events.append((at_s, next(number), index, place, False))
            if gap.length_s is not None:
                at_s += gap.length_s
                events.append((at_s, next(number), index, place, True))
    heapq.heapify(events)
    while events:
        now_s, _, index, place, ends = heapq.heappop(events)
        gap, trace_id, mine = sessions[index][place], TraceId(str(index)), of_session.setdefault(index, [])
        if ends:
            assert gap.length_s is not None
            forecast.resume(trace_id, now_s)
            insort(mine, gap.length_s)
            insort(seen, gap.length_s)
            continue
        if now_s - refreshed_s >= REFRESH_S:
            forecast.refresh(now_s)
            refreshed_s = now_s
        # Nobody tells an engine that a turn was the last; what learns of it is the silence.
        forecast.finish(trace_id, now_s, gap.signature)
        if seen and (gap.is_scored or gap.length_s is None):
            yield _ask(forecast, trace_id, gap, now_s, mine, seen)


def _ask(
    forecast: GapForecast, trace_id: TraceId, gap: Gap, now_s: float, mine: Sequence[float], seen: Sequence[float]
) -> Forecast:
    curve = tuple(forecast.chance_within(trace_id, edge, now_s) or 0.0 for edge in EDGES_S)
    ends = curve[-1]
    quantiles = tuple(forecast.quantile_remaining_s(trace_id, level * ends, now_s) or 0.0 for level in LEVELS)
    length_s = gap.length_s if gap.length_s is not None else EDGES_S[-1]
    place = (forecast.chance_within(trace_id, length_s, now_s) or 0.0) / ends if ends else 1.0
    return Forecast(gap, quantiles, place, curve, _quantiles(mine or seen), _quantiles(seen))


def _quantiles(ordered: Sequence[float]) -> tuple[float, ...]:
    return tuple(ordered[int(level * len(ordered))] for level in LEVELS)


def score(made: Sequence[Forecast]) -> dict[str, float]:
    """All figures, by name."""
    scored = [f for f in made if f.gap.is_scored and f.gap.length_s is not None]
    errors = {
        "forecast": [_error(f.quantiles_s[MEDIAN], f) for f in scored],
        "session's median": [_error(f.session_s[MEDIAN], f) for f in scored],
        "global median": [_error(f.global_s[MEDIAN], f) for f in scored],
        f"fixed {TTL_S:g} s": [_error(TTL_S, f) for f in scored],
    }
    found = {f"log error, {name}": mean(values) for name, values in errors.items()}
    found["log error / session's median's"] = mean(errors["forecast"]) / mean(errors["session's median"])
    losses = {
        "forecast": [_pinball(f.quantiles_s, f) for f in scored],
        "session's quantiles": [_pinball(f.session_s, f) for f in scored],
        "global quantiles": [_pinball(f.global_s, f) for f in scored],
        f"fixed {TTL_S:g} s": [_pinball((TTL_S,) * len(LEVELS), f) for f in scored],
    }
    found |= {f"pinball loss of the logarithm, {name}": mean(values) for name, values in losses.items()}
    for level in LEVELS:
        found[f"ended by the forecast's {level:.0%}"] = mean([float(f.place <= level) for f in scored])
    return found | retained(made)


def retained(made: Sequence[Forecast]) -> dict[str, float]:
    """Token-seconds that KV is held for as many hits as a time to live gets, by tokens."""
    hits = sum(f.gap.tokens for f in made if f.gap.length_s is not None and f.gap.length_s <= TTL_S)
    fixed = sum(f.gap.tokens * min(TTL_S, _length(f)) for f in made)
    low, high = 1e-9, 10.0  # the price of holding for a second, in hits
    kept = (0.0, 0.0)
    for _ in range(STEPS):
        price = math.sqrt(low * high)
        until = [_held_s(f.curve, price) for f in made]
        got = sum(f.gap.tokens for f, held in zip(made, until, strict=True) if _length(f) <= held)
        if got >= hits:
            low = price
            kept = got / hits, sum(f.gap.tokens * min(held, _length(f)) for f, held in zip(made, until, strict=True))
        else:
            high = price
    needed = sum(f.gap.tokens * _length(f) for f in made if _length(f) <= TTL_S)
    return {
        f"held, of a {TTL_S:g} s TTL's": kept[1] / fixed,
        "hits at that, of the TTL's": kept[0],
        "held with oracle gaps, of the TTL's": needed / fixed,
    }


def _length(f: Forecast) -> float:
    return math.inf if f.gap.length_s is None else f.gap.length_s


def _held_s(curve: Sequence[float], price: float) -> float:
    """Until when to hold: where the chance to have been asked for, less the price of the time held, is greatest."""
    best = held_s = time_s = last = at_s = 0.0
    for edge_s, chance in zip(EDGES_S, curve, strict=True):
        time_s += (1.0 - 0.5 * (last + chance)) * (edge_s - at_s)
        last, at_s = chance, edge_s
        if chance - price * time_s > best:
            best, held_s = chance - price * time_s, edge_s
    return held_s


def _error(said_s: float, f: Forecast) -> float:
    assert f.gap.length_s is not None
    return abs(math.log(max(LEAST_S, said_s) / max(LEAST_S, f.gap.length_s)))


def _pinball(quantiles_s: Sequence[float], f: Forecast) -> float:
    assert f.gap.length_s is not None
    truth, losses = math.log(max(LEAST_S, f.gap.length_s)), 0.0
    for level, said_s in zip(LEVELS, quantiles_s, strict=True):
        over = truth - math.log(max(LEAST_S, min(said_s, EDGES_S[-1])))
        losses += max(level * over, (level - 1) * over)
    return losses / len(LEVELS)


def _records(figures: dict[str, float], params: dict[str, object], num_gaps: int, seed: int) -> list[Record]:
    origin, log = record.origin(), str(params["log"])

    def better(name: str) -> str:
        return "-" if name.startswith(("ended", "hits")) else "lower"

    return [
        origin.record(
            "sim/gaps", log, params, name, "", better(name), [value] * num_gaps, source="simulated", seed=seed
        )
        for name, value in figures.items()
    ]


if __name__ == "__main__":
    main()
