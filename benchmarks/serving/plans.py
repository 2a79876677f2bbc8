"""The loads of the experiments: recorded sessions or synthetic shapes, as many as an experiment asks for."""

import random
from dataclasses import replace
from itertools import islice

from benchmarks.serving.experiment import Experiment, Source
from impala_vllm import workload
from impala_vllm.replay import parts, recording, synthetic
from impala_vllm.replay.lowering import lower
from impala_vllm.replay.plan import Plan
from impala_vllm.workload import WorkloadError


def agent_sessions(source: Source, experiment: Experiment) -> Plan:
    """Recorded sessions, lowered. The bundled log holds fewer: then all of it."""
    scale = experiment.scale
    bundled = source.traces == recording.bundled()
    turns = recording.choose(
        source.traces,
        None if bundled else (source.num_sessions or experiment.num_sessions),
        min_turns=1 if bundled else (scale.num_turns or 2),
        # Leaves room for the outputs, which shrink less than prompts.
        max_input_tokens=int(scale.max_context_tokens * scale.prompt * 0.9),
        seed=source.seed,
    )
    return lower(turns, scale, source.vocabulary, source.seed)


def single_requests(source: Source, experiment: Experiment) -> Plan:
    """The first lengths of a log as prompts that share nothing."""
    scale = experiment.scale
    count = source.num_sessions or experiment.num_sessions
    lengths = [
        (
            min(max(1, t.input_tokens // scale.prompt), scale.max_context_tokens - scale.max_output_tokens),
            min(max(scale.min_output_tokens, (t.output_tokens or 0) // scale.output), scale.max_output_tokens),
        )
        for t in islice(workload.read(source.traces), count)
    ]
    if not lengths:
        raise WorkloadError(f"{source.traces}: no request in it; give another log")
    return synthetic.independent(source.vocabulary, lengths, seed=source.seed)


def forks(source: Source, experiment: Experiment) -> Plan:
    """Synthetic parents with eight forks each."""
    return synthetic.fan_out(
        source.vocabulary, num_parents=source.num_sessions or experiment.num_sessions, seed=source.seed
    )


def jobs(source: Source, experiment: Experiment) -> Plan:
    """Synthetic labelling jobs."""
    return synthetic.labelling(
        source.vocabulary, num_jobs=source.num_sessions or experiment.num_sessions, seed=source.seed
    )


def short_of_a_chunk(source: Source, experiment: Experiment) -> Plan:
    """Single requests that share nothing and never fill a block of 128 tokens: there is nothing to cache."""
    count = source.num_sessions or experiment.num_sessions
    return synthetic.independent(source.vocabulary, [(16, 96)] * count, seed=source.seed)


def crowd(source: Source, experiment: Experiment) -> Plan:
    """As many recorded sessions as asked for: the bundled log again and again, in other words that share nothing."""
    copies: dict[str, Plan] = {}
    missing = source.num_sessions or experiment.num_sessions
    while missing > 0:
        one = replace(source, seed=source.seed + len(copies), num_sessions=missing)
        copies[f"copy{len(copies)}"] = plan = agent_sessions(one, experiment)
        missing -= len(plan.roots())
    return parts.combine(copies)


def plain_requests(source: Source, experiment: Experiment) -> Plan:
    """Lengths of the log given; without one, lengths drawn about as wide as those of conversations."""
    if source.traces != recording.bundled():
        return single_requests(source, experiment)
    rng = random.Random(source.seed)
    lengths = [
        (min(max(8, int(rng.lognormvariate(5.0, 1.0))), 2048), min(max(2, int(rng.lognormvariate(3.0, 0.8))), 128))
        for _ in range(source.num_sessions or experiment.num_sessions)
    ]
    return synthetic.independent(source.vocabulary, lengths, seed=source.seed)


def beside_a_long_one(source: Source, experiment: Experiment) -> Plan:
    """Short turns alone, then as many beside one long generation."""
    return synthetic.head_of_line(
        source.vocabulary, num_short=source.num_sessions or experiment.num_sessions, seed=source.seed
    )


QUARTER_S = 60.0
"""A prior: long enough for eight sessions of ten turns to start, short enough for four of them and five pairs."""


def drifting(source: Source, experiment: Experiment) -> Plan:
    """A quarter each of sessions with short gaps, with long gaps, single requests and fan-outs."""
    count = source.num_sessions or experiment.num_sessions

    def sessions(seed: int, **scale: float) -> Plan:
        changed = replace(experiment, scale=replace(experiment.scale, **scale), num_sessions=count)
        return agent_sessions(replace(source, seed=source.seed + seed), changed)

    quarters = {
        "short-gaps": sessions(0, max_gap_s=0.5),
        "long-gaps": sessions(1, gap=1.0),
        "single-requests": synthetic.independent(source.vocabulary, [(1024, 32)] * 4 * count, seed=source.seed),
        "fan-outs": synthetic.fan_out(source.vocabulary, num_parents=max(1, count // 4), seed=source.seed),
    }
    return parts.combine(
        {name: parts.spread(plan, i * QUARTER_S, QUARTER_S) for i, (name, plan) in enumerate(quarters.items())}
    )
