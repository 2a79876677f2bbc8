"""What each benchmark asks, in words for RESULTS.md."""

import re
from typing import NamedTuple

_LEVEL = re.compile(r"-([0-9.e+]+)x$")


class Question(NamedTuple):
    """A heading and what the table below it answers."""

    title: str
    asks: str


_IDENTITY = (
    "Naive gives a request to the owner of the longest prefix it knows. Link F1 asks whether a request was put into "
    "the trace it belongs to; predecessor F1 only whether the one request named as the one before is of that trace."
)

_VIRTUAL = (
    "The load of the serving benchmark of that name, on vLLM's own scheduler and impala's own code in virtual time; "
    "only the time of a step is modelled. Ratios are to the first arm with the same sessions."
)

_GPU_SESSIONS = (
    "Stock, stock with vLLM's offloading and impala with the same bytes of host memory, one engine each, in process "
    "without HTTP. One run an arm: no interval."
)

_VALIDATION = (
    "The same sessions in `impala simulate` and on vLLM's scheduler in virtual time: mean stall and hit ratio, "
    "each as a ratio. Within 0.85 to 1.15 the simulator may be believed; hit ratios that differ by 0.01 are alike."
)

QUESTIONS = {
    "serving/baseline": Question(
        "What eviction costs: stock vLLM against a pool that never evicts",
        "Agent sessions whose KV does not fit HBM together. Stock vLLM forgets a session during its tool calls and "
        "computes it again; a pool that never evicts is the limit of what caching can do. The distance between the "
        "two is what there is to win. impala-observe decides nothing and should equal stock; impala-enforce here is an "
        "early version in one pair: see the agents benchmark.",
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
        "A parent thinks, forks eight children off its context, and joins them. The makespan is what a user of it "
        "waits for.",
    ),
    "serving/labelling": Question(
        "Labelling jobs on one stem",
        "One-turn jobs with the same instructions: nothing to win, so a makespan_s ratio above 1 is a loss.",
    ),
    "serving/agents": Question(
        "Agent sessions: stock against everything impala decides",
        "The load of baseline in interleaved pairs. tasks_per_hour should be above stock's and stall below it, at "
        "every level of oversubscription or, where everything fits, equal to it.",
    ),
    "serving/tiers": Question(
        "KV below HBM: vLLM's own tiers against ours, the same bytes",
        "The load of agents with host memory and a disk behind HBM, links capped at the ratios of a GPU's where the "
        "parameters say so. vLLM's managers run with our row-copy worker, because its own refuses the CPU; its fs tier "
        "knows no limit. impala-host has no disk.",
    ),
    "serving/tiers-slow": Question(
        "KV below HBM on slow links",
        "The same with links of 4 and 0.7 times the prefill rate: a disk that is slower than the engine, where loading "
        "everything loses to choosing.",
    ),
    "serving/tiers-host": Question(
        "Host memory alone below HBM",
        "The same without a disk: vLLM's least recently used host tier against ours.",
    ),
    "serving/tiers-uncapped": Question(
        "KV below HBM without caps, against a pool that never evicts",
        "Links as fast as the machine copies. impala-host has no disk. A stall of 1 would be as good as HBM for all.",
    ),
    "serving/tiers-half-host": Question(
        "KV below HBM with little host memory, without caps",
        "The same with host of half of HBM and a disk.",
    ),
    "serving/tiers-ablation": Question(
        "What each policy is worth with tiers",
        "Links at the ratios of a GPU's, one policy off at a time: a stall ratio above 1 is what it earns.",
    ),
    "serving/tiers-idle": Question(
        "What tiers cost that have nothing to do",
        "Decoding alone: no request fills a block, so nothing is stored, loaded or found. A ratio of requests_per_s "
        "below 0.99 or of cpu_s above 1.01 is a loss, as far as the interval can tell.",
    ),
    "serving/control-one-engine": Question(
        "The same, to a percent",
        "Two engines of one build were seen to differ by several percent. Here one engine serves short runs in "
        "turn with impala's hooks and as stock vLLM: what is left is what deciding costs.",
    ),
    "serving/restart": Question(
        "Does a restarted server compute what its disk holds?",
        "Sessions are played up to a turn, the server ends and starts again on the same disk, then each session's next "
        "turn comes. Beyond what an infinite cache computes of these turns, nothing should be computed.",
    ),
    "serving/ablation": Question(
        "What each policy is worth",
        "The load of agents with policies added one by one. impala-identity decides nothing and should equal stock; "
        "a policy that adds less than 5 % anywhere has to go.",
    ),
    "serving/compute-bound": Question(
        "When everything that is live fits and compute is short",
        "Sessions with short gaps arrive at 0.95 of the rate that stock gets through, 16 requests in service at most, "
        "no eviction. Only order can help here: mean stall should fall, and p99 must not pay for it.",
    ),
    "serving/fits-batch": Question(
        "When everybody has KV and a running slot",
        "The same sessions with slots for all: order cannot help, so nothing should be lost to it. Mean stall within "
        "1 % of stock's. One engine, switched between runs.",
    ),
    "serving/head-of-line": Question(
        "Do short turns suffer from one long generation?",
        "Fifty short turns alone, then fifty behind a generation of 1,500 tokens, in one run. JCT of a single turn is "
        "its latency: the short ones' p95 beside the long one over that alone should be near 1, and the long one "
        "must not starve for it.",
    ),
    "serving/drift": Question(
        "What when the load changes its shape?",
        "A minute each of sessions with short gaps, with long gaps, single requests and fan-outs, open loop. No "
        "quarter may stall longer than on stock for what was learned in the one before.",
    ),
    "serving/control": Question(
        "What deciding costs on traffic that is not agents",
        "Single requests that share nothing, interleaved pairs: a ratio of requests_per_s below 0.99 or of cpu_s "
        "above 1.01 is a loss, as far as the interval can tell.",
    ),
    "sim/agents": Question(
        "What each policy is worth, over seeds",
        "vLLM's own scheduler and impala's own code in virtual time, with other recorded sessions for each seed; only "
        "the time of a step is modelled. Ratios are to stock with the same sessions. impala-identity has every policy "
        "off but still evicts trace by trace.",
    ),
    "sim/compute-bound": Question("Order where compute is short, over seeds", _VIRTUAL),
    "sim/fits-batch": Question("The same with a running slot for everybody, over seeds", _VIRTUAL),
    "sim/drift": Question("A workload that flips every minute, over seeds", _VIRTUAL),
    "sim/fan-out": Question("Parents with forks and a join, over seeds", _VIRTUAL),
    "sim/head-of-line": Question("Short turns beside a long generation, over seeds", _VIRTUAL),
    "sim/labelling": Question("Labelling jobs on one stem, over seeds", _VIRTUAL),
    "sim/validation": Question("The simulator beside vLLM's own scheduler", _VALIDATION),
    "sim/measured": Question(
        "The simulator beside real engines",
        "What records of serving/ say of a load, and what `impala simulate`'s code says of the same plan, pool, tiers "
        "and links. Machines are as fast as they are on the day, so stall is a ratio to the first arm's: within 0.85 "
        "to 1.15 of the measured one, and hit ratios within 15 % (or 0.01), the simulator may be believed.",
    ),
    "sim/validation-host": Question("The simulator beside vLLM's own scheduler, with a host tier", _VALIDATION),
    "sim/validation-host-nvme": Question("The simulator beside vLLM's own scheduler, host and NVMe", _VALIDATION),
    "micro/block-io-load": Question(
        "Block I/O for the NVMe tier: io_uring, threads and fio on one file",
        "Random blocks at a fixed number of operations at once, past the page cache, turn by turn. Ours also checksums "
        "every block, fio does not. Ratios are of runs that followed each other. Where others use the machine too, "
        "bandwidth says as much of them as of us, and CPU seconds a GB are the steadier figure.",
    ),
    "micro/gpu-link": Question(
        "The link between a GPU and pinned host memory", "Large copies: what the rest is held to."
    ),
    "micro/gpu-swap": Question(
        "Batches of pages over the link: our kernels, vLLM's own swap, the link",
        "By page size and batch. `vllm` is what its worker would choose, `vllm_dma` its batched copy, `courier` what "
        "ours chooses, on its own stream; `impala` is the kernel alone. Asked: 0.9 of the link from 16 KiB pages up, "
        "ahead of vLLM below.",
    ),
    "micro/gpu-worker": Question(
        "Whole jobs of the offloading worker, ours and vLLM's",
        "At the layouts of real models. `submit` is time of the engine's thread; bytes were compared before.",
    ),
    "micro/gpu-overlap": Question(
        "What decoding loses beside copies at full link",
        "The mean time of a decode-like step in a CUDA graph, to that alone. Asked: 1.03 at most.",
    ),
    "micro/gpu-pack": Question(
        "Fused packing, checksums and FP8", "Scattered pages of all layers to one run, in host memory or in HBM."
    ),
    "micro/gpu-tune": Question(
        "Which launch numbers are best, and from where DMA wins", "Provenance of the numbers in kernels/ops/tuning.py."
    ),
    "serving/gpu-sessions-1b": Question("Recorded sessions on a GPU, 1.7 B random parameters", _GPU_SESSIONS),
    "serving/gpu-sessions-8b": Question("Recorded sessions on a GPU, 8.2 B random parameters", _GPU_SESSIONS),
    "micro/scheduler_overhead": Question(
        "What hooks cost the engine loop", "Microseconds of the observing scheduler, with 2,000 traces known."
    ),
    "micro/identity": Question("What recognising a trace costs", "Microseconds an arrival, with 2,000 traces known."),
    "micro/fleet": Question(
        "What routing costs",
        "Processor time (a thread's own clock) of a decision for 142k tokens among 64 servers, of events, of what "
        "routers tell each other, and of what a snapshot costs the engine loop.",
    ),
    "serving/fleet-emulated": Question(
        "Several servers under several routers, over HTTP",
        "Emulated servers (an engine's timing, real KV events) and synthetic agents without ids; packaged routers as "
        "their own processes, impala in the clients'. `sticky` is told each session's number. One machine runs all of "
        "it: figures compare arms and say nothing absolute.",
    ),
    "serving/fleet": Question(
        "Several servers under several routers, over HTTP, each router a process",
        "Emulated servers (an engine's timing, real KV events) and recorded coding sessions as chats without ids. A "
        "token stands for `scale` of the recording's, in the timing and in our prices too, and times are shorter by "
        "`speed`. sticky, sticky_least_loaded and programs are told which session a turn belongs to; impala is told "
        "nothing. Spread is the busiest server's prefill over the mean. Ratios are impala's to the router beside "
        "which it looks worst, of the repetitions in which both served every turn; sticky, which no router can be, "
        "is none of them. `short of` names who is compared less often than others or not at all, `tried again` what "
        "failed once. One machine runs all of it: figures compare arms and say nothing absolute.",
    ),
    "serving/fleet-engines": Question(
        "Recorded sessions without ids before two real engines",
        "Through `impala router`, as chats on a tiny model: turns that failed, and what the engines hit, to one cache "
        "that never forgets (`hits / bound`). Each engine has HBM for `room` of all distinct blocks. round_robin sends "
        "turns to the same engines one after the other, later and under another cache salt.",
    ),
    "serving/partition": Question(
        "How soon is a server known again, once the network is back?",
        "Router and emulated server in two network namespaces, the cable between them pulled while the server goes on "
        "computing. Until the server is open again and the index says of every block what its pool does. A partition "
        "of seconds is noticed by events only; after a longer one the server was taken for down and forgotten.",
    ),
    "serving/router-overhead": Question(
        "What the router adds to a stream",
        "First byte and later chunks of many concurrent streams, through `impala router` and direct, interleaved. "
        "Servers, router and clients are processes of one machine.",
    ),
    "sim/fleet": Question(
        "Which server? Recorded sessions on a fleet in virtual time",
        "The router's own decisions beside other policies, re-implemented, on emulated engines. consistent_hash and "
        "sticky are told which session a turn belongs to; impala is told nothing. Spread is the busiest server's "
        "prefill over the mean.",
    ),
    "sim/fleet-agents": Question(
        "The same, synthetic agents",
        "The agents of `benchmarks.fleet`, without a machine's noise. Spread is what they are for: sessions of one "
        "kind, so that no long one outweighs its placement.",
    ),
    "sim/fleet-restarts": Question(
        "The same while servers restart",
        "Every minute a share of the servers loses all KV.",
    ),
    "sim/sustained": Question(
        "How many sessions are sustained, open loop",
        "The same in virtual time, with sessions that arrive at a Poisson rate whoever is still there. A load of n is "
        "the rate at which n would be live if nobody were slowed; sustained is the highest whose p95 slowdown (stall "
        "over stall alone) is at most 2.",
    ),
    "micro/simulator": Question(
        "How much can be simulated?",
        "Requests that a simulation serves in a minute of one core's time, and its process's memory at its peak: a "
        "recorded log on one replica, as `impala simulate` takes it, or generated one-turn requests on many.",
    ),
    "sim/study": Question(
        "Where does impala not win?",
        "Each point is a workload, an oversubscription of HBM, tiers and links; all policies of docs/policies.md serve "
        "the same sessions. impala over whichever rival stalls least there, and over whichever ends most tasks: within "
        "1.02 and 0.99 it wins or equals it. Bounds are no rivals. Load is the one that a point came to: HBM holds the "
        "longest turn at least. Paying: impala's steps are longer by what deciding took in micro/, rivals' are not. "
        "Measures of every policy and seed: benchmarks/results/study.",
    ),
    "sim/papers": Question(
        "Are the rivals as good here as their papers say?",
        "One published figure each, on a made-up load like the paper's. What is not reproduced, and why: "
        "docs/policies.md.",
    ),
    "sim/gaps": Question(
        "How good is the forecast of gaps?",
        "Scored on each gap before it is known. Log errors are of medians; a calibrated forecast has a tenth ended by "
        "its 10 %. Held: token-seconds of KV kept for as many hits as a fixed time to live gets, over what that holds.",
    ),
    "sim/tiers": Question(
        "Tiers below HBM, over seeds",
        "The same with host memory and a disk behind HBM. vLLM's managers and ours decide, links are rates. Ratios are "
        "to the first variant with the same sessions.",
    ),
    "audit/tau-bench-airline": Question(
        "Does the audit name what broke a prefix: chat requests with tool calls",
        "tau-bench trajectories. Named rightly means the right cause in the right segment of the right turn.",
    ),
    "audit/lmcache-agents": Question(
        "Does the audit name what broke a prefix: agent traces",
        "Steps of LMCache's traces that go on from the ones before, each step's news as one message.",
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


def question(name: str) -> Question | None:
    """By the name in a record; `NAME-4x` is NAME with a working set of four times HBM."""
    if name in QUESTIONS or (level := _LEVEL.search(name)) is None:
        return QUESTIONS.get(name)
    plain = QUESTIONS.get(name[: level.start()])
    return plain and plain._replace(title=f"{plain.title}; working set {level.group(1)}x HBM")
