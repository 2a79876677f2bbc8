"""What each benchmark asks, in words for RESULTS.md."""

from typing import NamedTuple


class Question(NamedTuple):
    """A heading and what the table below it answers."""

    title: str
    asks: str


_IDENTITY = (
    "Naive gives a request to the owner of the longest prefix it knows. Link F1 asks whether a request was put into "
    "the trace it belongs to; predecessor F1 only whether the one request named as the one before is of that trace."
)

QUESTIONS = {
    "serving/baseline": Question(
        "What eviction costs: stock vLLM against a pool that never evicts",
        "Agent sessions whose KV does not fit HBM together. Stock vLLM forgets a session during its tool calls and "
        "computes it again; a pool that never evicts is the limit of what caching can do. The distance between the "
        "two is what there is to win. impala-observe decides nothing and should equal stock; impala-enforce is an "
        "experiment whose bars ask for five pairs and more.",
    ),
    "serving/link-f1": Question(
        "Does a live server recognise the sessions?",
        "Whole recorded sessions, interleaved, no client ids. F1 over links (a request and the one before it in the "
        "same session), from the running server's own answers.",
    ),
    "serving/observe-cost-agent": Question(
        "What observing costs on agent traffic",
        "The same saturated batch on stock vLLM and with impala observing, interleaved in pairs. A ratio of "
        "requests_per_s below 1 is what observing costs; one of cpu_s above 1 likewise. Where the interval is wider "
        "than the 1 % in question, as on a shared machine, it shows no difference and proves no bound; the share of "
        "time in impala's hooks, by their own clock, does.",
    ),
    "serving/observe-cost-azure": Question(
        "What observing costs on traffic that is not agents",
        "Single requests with the lengths of a production trace, nothing shared; interleaved pairs. Ratios as above.",
    ),
    "serving/sustained": Question(
        "How many sessions at once?",
        "The most sessions kept live at once with a p95 slowdown of at most 2 (stall over stall alone).",
    ),
    "serving/fan-out": Question(
        "Parents with forks and a join",
        "A parent thinks, forks eight children off its context, and joins them.",
    ),
    "serving/labelling": Question(
        "Labelling jobs on one stem",
        "One-turn jobs with the same instructions.",
    ),
    "identity/kv-cache-tester": Question(
        "Claude Code sessions, all started within an hour",
        f"Sessions that share tools and system prompt, rewrite their history and start sub-agents. {_IDENTITY}",
    ),
    "identity/kv-cache-tester-10h": Question("The same sessions, started within ten hours", _IDENTITY),
    "identity/kv-cache-tester-100h": Question("The same sessions, started within a hundred hours", _IDENTITY),
    "identity/magagent": Question(
        "Several agents in one program", f"Roles with prompts of their own, one after the other. {_IDENTITY}"
    ),
    "identity/taubench": Question(
        "An agent and a simulated user", f"Two roles, many prompts shorter than a block. {_IDENTITY}"
    ),
    "identity/miniswe": Question("One agent, one history", f"The easy case. {_IDENTITY}"),
    "identity/tau-bench-trajectories": Question(
        "Four attempts at each task, with equal openings", f"The prefix is no evidence for long. {_IDENTITY}"
    ),
}
