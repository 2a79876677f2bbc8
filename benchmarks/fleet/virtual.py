"""Fleets in virtual time: recorded sessions, emulated engines, the router's own decisions beside others'.

    python -m benchmarks.fleet.virtual --traces LOG --servers 16 --sessions-per-server 6 --seeds 0,1,2 [--record]

`impala` is `fleet.router.Router` as `impala router` runs it, told nothing but prompts; `consistent_hash` and `sticky`
are told which session a turn belongs to. With --restarts that share of the servers loses all KV every minute. Without
--traces the sessions are the synthetic agents of `benchmarks.fleet`, for its figures without a machine's noise:

    python -m benchmarks.fleet.virtual --servers 16 --sessions-per-server 2 --turns 4 --spread-s 3 \\
        --hbm-tokens 30000 --speed 0.1
"""

import argparse
import json
import statistics
from pathlib import Path
from random import Random

import msgspec

from benchmarks import record
from benchmarks.fleet import sessions
from benchmarks.fleet.engines import ARMS, Fleet, Result
from impala_vllm.sim.timing import DEFAULT, Timing, load


def main() -> None:
    """Run the arms on the same sessions, print medians and ratios to the best other arm."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet.virtual", description=main.__doc__)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--servers", type=int, default=16)
    parser.add_argument("--sessions-per-server", type=float, default=6.0)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--spread-s", type=float, default=60.0, help="sessions start within so many seconds")
    parser.add_argument("--restarts", type=float, default=0.0, help="share of servers that restart every minute")
    parser.add_argument("--coarser", type=int, default=1, help="take so many recorded blocks as one, for large fleets")
    parser.add_argument("--hbm-tokens", type=int, help="other than the timing's")
    parser.add_argument("--speed", type=float, default=1.0, help="of the timing")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    timing = _at_speed(load(DEFAULT), args.speed, args.hbm_tokens)
    pool = sessions.recorded(args.traces, args.turns, args.coarser) if args.traces else None
    found: dict[str, list[Result]] = {arm: [] for arm in args.arms.split(",")}
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for seed in seeds:
        lot = Random(seed)
        number = round(args.servers * args.sessions_per_server)
        chosen = sessions.chosen(pool, number, lot) if pool else sessions.agents(number, args.turns, lot)
        starts_s = [lot.uniform(0.0, args.spread_s) for _ in chosen]
        for arm, results in found.items():
            results.append(Fleet(arm, chosen, args.servers, timing, Random(seed)).run(starts_s, args.restarts))
            print(json.dumps({"arm": arm, "seed": seed, **results[-1]._asdict()}), flush=True)
    for arm, results in found.items():
        print(
            json.dumps(
                {"arm": arm, "median": {n: statistics.median(getattr(r, n) for r in results) for n in Result._fields}}
            )
        )
    if args.record:
        print(record.append(_records(found, args, record.origin())))


def _at_speed(timing: Timing, speed: float, hbm_tokens: int | None) -> Timing:
    names = ("fixed_s", "prefill_s_per_token", "prefill_s_per_token_and_context")
    names += ("decode_s_per_request", "decode_s_per_context")
    slower = {name: getattr(timing, name) / speed for name in names}
    return msgspec.structs.replace(timing, hbm_tokens=hbm_tokens or timing.hbm_tokens, **slower)


def _records(found: dict[str, list[Result]], args: argparse.Namespace, origin: record.Origin) -> list[record.Record]:
    kinds = {"tasks_per_hour": ("tasks/h", "higher"), "stall_mean_s": ("s", "lower"), "stall_p95_s": ("s", "lower"),
             "hit_ratio": ("share", "higher"), "spread": ("ratio", "lower")}  # fmt: skip
    params = {
        "servers": args.servers,
        "sessions_per_server": args.sessions_per_server,
        "turns": args.turns,
        "spread_s": args.spread_s,
        "restarts_a_minute": args.restarts,
        "traces": args.traces.name if args.traces else "agents",
    }
    question = "sim/fleet-restarts" if args.restarts else "sim/fleet" if args.traces else "sim/fleet-agents"
    records: list[record.Record] = []
    for arm, results in found.items():
        for metric, (unit, better) in kinds.items():
            values = sorted(getattr(r, metric) for r in results)
            low, high = values[round(0.2 * (len(values) - 1))], values[round(0.8 * (len(values) - 1))]
            records.append(
                record.Record(
                    question=question,
                    variant=arm,
                    params=params,
                    metric=metric,
                    unit=unit,
                    better=better,
                    n=len(values),
                    p20=low,
                    p50=statistics.median(values),
                    p80=high,
                    source="simulated",
                    seed=None,
                    commit=origin.commit,
                    versions=origin.versions,
                    machine=origin.machine,
                    command=origin.command,
                )
            )
    return records


if __name__ == "__main__":
    main()
