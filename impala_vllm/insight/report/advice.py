"""What to do about a ledger's figures: a line each, worst first, named as in docs/report.md."""

from typing import NamedTuple

from impala_vllm.insight.report.figures import Figures
from impala_vllm.insight.report.totals import PHASES

EVICTED_SHARE, REWRITTEN_SHARE, PREEMPTED_SHARE = 0.05, 0.05, 0.02
"""Of prompt tokens: below, there is less to gain than the next run differs by."""
PART_SHARE = 0.25
"""Of the stall: a part this large has a cause of its own."""
IDLE_SHARE = 0.5
FAILED_SHARE = 0.02
UNLINKED_SHARE = 0.1


class Advice(NamedTuple):
    """A symptom with its size, and what to do."""

    symptom: str
    """Names its paragraph in docs/report.md."""
    size: str
    remedy: str


def advise(found: Figures, mode: str | None) -> list[Advice]:
    """`mode` of the servers; None: unknown or mixed."""
    given: list[tuple[float, Advice]] = []

    def say(weight: float, bound: float, symptom: str, size: str, remedy: str) -> None:
        if weight >= bound:
            given.append((weight, Advice(symptom, size, remedy)))

    prompt = max(1, found.prompt_tokens)
    evicted = found.again["evicted"] / prompt
    remedy = "give the servers host memory or NVMe (--impala-host-gib, --impala-nvme-path)"
    if mode == "observe":
        remedy = "let impala decide (--impala-mode enforce), and " + remedy
    say(evicted, EVICTED_SHARE, "KV was evicted before it was needed again", f"{evicted:.0%} of prompt tokens", remedy)
    rewritten = found.again["rewritten"] / prompt
    say(
        rewritten, REWRITTEN_SHARE, "clients change what they have sent before", f"{rewritten:.0%} of prompt tokens",
        "`impala audit` on a log of requests says which part of the prompt, and how to mend it",
    )  # fmt: skip
    preempted = found.again["preempted"] / prompt
    say(
        preempted, PREEMPTED_SHARE, "turns were preempted", f"{preempted:.0%} of prompt tokens",
        "fewer running at a time (--max-num-seqs), or more room for KV (--gpu-memory-utilization)",
    )  # fmt: skip
    stall = sum(found.time_s[name] for name in PHASES)
    for phase, symptom, remedy in (
        ("queue", "turns wait for a place", "add servers, or see what fills the ones there are: `impala top`"),
        (
            "hold",
            "admission holds turns back",
            "more room below HBM makes holding cheaper; fewer agents at a time, too",
        ),
        ("load", "loading KV takes long", "a faster disk, or more host memory; see tiers in the docs"),
        ("decode", "most of the stall is writing answers", "shorter outputs, speculative decoding or a faster GPU"),
    ):
        share = found.time_s[phase] / stall if stall else 0.0
        bound = 2 * PART_SHARE if phase == "decode" else PART_SHARE
        say(share * 0.1, bound * 0.1, symptom, f"{share:.0%} of the stall", remedy)
    idle = 1 - found.busy_share
    say(
        idle * 0.1, IDLE_SHARE * 0.1, "devices are idle", f"{idle:.0%} of the time paid for",
        "more agents on these servers, or fewer servers: idle time counts in tasks per dollar",
    )  # fmt: skip
    failed = found.failures / max(1, found.turns)
    say(
        failed, FAILED_SHARE, "turns fail or are hung up on", f"{failed:.0%} of turns",
        "compare the clients' time-outs with the stall percentiles; errors are in the server's log",
    )  # fmt: skip
    unlinked = found.unlinked_turns / max(1, found.turns + found.unlinked_turns)
    say(
        unlinked * 0.1, UNLINKED_SHARE * 0.1, "many requests belong to no trace", f"{unlinked:.0%} of requests",
        "prefix caching is off, identity was switched off (/impala/health), or they are pooling requests",
    )  # fmt: skip
    return [advice for _, advice in sorted(given, key=lambda g: -g[0])]
