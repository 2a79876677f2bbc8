"""Shapes that no bundled recording has: a parent with forks and a join, jobs on one stem, single requests,
short turns beside a long generation.

Lengths are given in the engine's tokens: nothing here is scaled.
"""

from collections.abc import Sequence

from impala_vllm.replay import parts
from impala_vllm.replay.plan import Plan, PlannedSession, PlannedTurn
from impala_vllm.replay.vocabulary import Vocabulary


def fan_out(
    vocabulary: Vocabulary,
    *,
    num_parents: int = 1,
    num_forks: int = 8,
    stem_tokens: int = 512,
    task_tokens: int = 1024,
    fork_turns: int = 4,
    turn_tokens: int = 96,
    output_tokens: int = 16,
    gap_s: float = 0.5,
    seed: int = 0,
) -> Plan:
    """Parents that think once, fork children off their own context, and join them all in one more turn."""
    stem = vocabulary.text(f"{seed}/stem", stem_tokens)
    sessions: list[PlannedSession] = []
    for p in range(num_parents):
        name = f"parent{p}"
        text = _Text(vocabulary, seed, output_tokens)
        first = text.turn(f"{name}#0", stem + vocabulary.text(f"{seed}/{name}", task_tokens), 0.0)
        context = first.prompt + first.output
        names = tuple(f"{name}/fork{f}" for f in range(num_forks))
        report = context + vocabulary.text(f"{seed}/{name}/join", turn_tokens)
        sessions.append(PlannedSession(name, (first, text.turn(f"{name}#1", report, gap_s, names))))
        for child in names:
            turns = text.dialogue(child, context, fork_turns, turn_tokens, gap_s)
            sessions.append(PlannedSession(child, turns, name, 0, gap_s))
    return Plan(tuple(sessions))


def labelling(
    vocabulary: Vocabulary,
    *,
    num_jobs: int = 1000,
    stem_tokens: int = 1024,
    item_tokens: int = 48,
    output_tokens: int = 4,
    seed: int = 0,
) -> Plan:
    """One-turn jobs with the same instructions and an item of their own."""
    stem = vocabulary.text(f"{seed}/stem", stem_tokens)
    text = _Text(vocabulary, seed, output_tokens)
    jobs = (f"job{j}" for j in range(num_jobs))
    return Plan(
        tuple(
            PlannedSession(job, (text.turn(f"{job}#0", stem + vocabulary.text(f"{seed}/{job}", item_tokens), 0.0),))
            for job in jobs
        )
    )


def independent(
    vocabulary: Vocabulary, lengths: Sequence[tuple[int, int]], arrivals_s: Sequence[float] | None = None, seed: int = 0
) -> Plan:
    """Single requests of (prompt, output) tokens that share nothing: traffic that is not agents."""
    sessions: list[PlannedSession] = []
    for i, (prompt, output) in enumerate(lengths):
        turn = _Text(vocabulary, seed, output).turn(f"single{i}#0", vocabulary.text(f"{seed}/single{i}", prompt), 0.0)
        sessions.append(PlannedSession(f"single{i}", (turn,), arrival_s=arrivals_s[i] if arrivals_s else 0.0))
    return Plan(tuple(sessions))


def head_of_line(
    vocabulary: Vocabulary,
    *,
    num_short: int = 50,
    short: tuple[int, int] = (256, 16),
    long: tuple[int, int] = (512, 1500),
    spacing_s: float = 0.5,
    pause_s: float = 10.0,
    seed: int = 0,
) -> Plan:
    """Short (prompt, output) turns alone, a pause, then as many of the same lengths behind one long generation.

    Parts `short-alone`, `long` and `short-beside-long`, on the clock of open-loop load. The pause is for the
    first to drain: both are asked of one run, so that the machine's drift is not taken for the long one's doing.
    """
    every = [i * spacing_s for i in range(num_short)]
    begin_s = num_short * spacing_s + pause_s
    return parts.combine(
        {
            "short-alone": independent(vocabulary, [short] * num_short, every, seed=3 * seed),
            "long": independent(vocabulary, [long], [begin_s], seed=3 * seed + 1),
            "short-beside-long": independent(
                vocabulary, [short] * num_short, [begin_s + spacing_s + at for at in every], seed=3 * seed + 2
            ),
        }
    )


class _Text:
    """Turns with outputs of one length."""

    def __init__(self, vocabulary: Vocabulary, seed: int, output_tokens: int) -> None:
        self._vocabulary = vocabulary
        self._seed = seed
        self._output_tokens = output_tokens

    def turn(self, name: str, prompt: tuple[int, ...], gap_s: float, joins: tuple[str, ...] = ()) -> PlannedTurn:
        text = self._vocabulary.text(f"{self._seed}/output/{name}", max(0, self._output_tokens - 1))
        return PlannedTurn(name, prompt, (*text, self._vocabulary.eos), gap_s, joins)

    def dialogue(
        self, name: str, context: tuple[int, ...], num_turns: int, turn_tokens: int, gap_s: float
    ) -> tuple[PlannedTurn, ...]:
        turns: list[PlannedTurn] = []
        for i in range(num_turns):
            key = f"{name}#{i}"
            context += self._vocabulary.text(f"{self._seed}/{key}", turn_tokens)
            turns.append(self.turn(key, context, gap_s if i else 0.0))
            context += turns[-1].output
        return tuple(turns)
