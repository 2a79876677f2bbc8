"""Made-up programs in the shape of those that papers evaluate on: agents that call tools, and workflows of agents."""

import math
from dataclasses import dataclass, replace
from itertools import count
from random import Random

from impala_vllm.core.types import Outcome
from impala_vllm.sim.sessions import Session, Turn, Workload

BLOCK = 128


@dataclass(frozen=True, slots=True)
class Agents:
    """Programs that call tools between turns and grow by what those answer."""

    num_programs: int
    turns: tuple[int, int]
    first_tokens: int
    grown_tokens: int
    output_tokens: int
    gap_s: float
    """Median of a tool call; lengths are log-normal."""
    spread: float
    """Of the logarithm of calls."""
    arrivals_per_s: float | None
    """None: all at once."""
    is_heavy: bool = False
    """Numbers of turns have a heavy tail."""

    def make(self, seed: int) -> Workload:
        """Programs by Poisson arrivals. One tool a fifth as long as the other two."""
        rng, keys, now = Random(seed), count(1), 0.0
        made: list[Session] = []
        for number in range(self.num_programs):
            if self.arrivals_per_s is not None:
                now += rng.expovariate(self.arrivals_per_s)
            low, high = self.turns
            num_turns = min(high, int(low * rng.paretovariate(1.1))) if self.is_heavy else rng.randint(low, high)
            made.append(self._session(f"p{number}", num_turns, rng, keys, now))
        return Workload(BLOCK, tuple(made), has_one_clock=self.arrivals_per_s is not None)

    def describe(self) -> str:
        """For a record."""
        return f"{self.num_programs} programs, {self.turns[0]}-{self.turns[1]} turns, calls of {self.gap_s:g} s"

    def _session(self, name: str, num_turns: int, rng: Random, keys: "count[int]", now: float) -> Session:
        chain: list[int] = []
        turns: list[Turn] = []
        prompt, gap_s = round(self.first_tokens * rng.uniform(0.5, 1.5)), 0.0
        for index in range(num_turns):
            tokens = prompt + self.output_tokens
            chain += [next(keys) for _ in range(tokens // BLOCK - len(chain))]
            is_last = index == num_turns - 1
            tool, median_s = rng.choice((("read", self.gap_s / 5), ("test", self.gap_s), ("build", self.gap_s)))
            after_s = None if is_last else rng.lognormvariate(math.log(median_s), self.spread)
            outcome = Outcome.STOP if is_last else Outcome.TOOL_CALL
            turns.append(
                Turn(f"{name}.{index}", tuple(chain), prompt, self.output_tokens, gap_s, outcome=outcome, tool=tool,
                     next_gap_s=after_s)
            )  # fmt: skip
            prompt, gap_s = tokens + round(self.grown_tokens * rng.uniform(0.5, 1.5)), after_s or 0.0
        return Session(name, tuple(turns), arrival_s=now)


@dataclass(frozen=True, slots=True)
class Workflow:
    """Agents that take turns, one at a time, each behind a fixed prompt of its own: nothing else is used again.

    A turn begins every `step_s`, which is longer than a turn takes: their latencies add up to the workflow's.
    """

    num_agents: int
    num_rounds: int
    fixed_tokens: int
    fresh_tokens: int
    """Of each prompt, behind the fixed ones."""
    output_tokens: int
    step_s: float = 4.0

    def make(self, seed: int) -> Workload:
        """One session an agent. Lengths of fresh parts differ by seed."""
        rng, keys = Random(seed), count(1)
        made: list[Session] = []
        for number in range(self.num_agents):
            fixed = tuple(next(keys) for _ in range(self.fixed_tokens // BLOCK))
            turns = [self._turn(f"a{number}.{i}", fixed, rng, keys) for i in range(self.num_rounds)]
            made.append(Session(f"a{number}", tuple(turns), arrival_s=number * self.step_s))
        return Workload(BLOCK, tuple(made), has_one_clock=True)

    def describe(self) -> str:
        """For a record."""
        return f"{self.num_agents} agents in turn, {self.num_rounds} rounds, prompts of {self.fixed_tokens}"

    def _turn(self, name: str, fixed: tuple[int, ...], rng: Random, keys: "count[int]") -> Turn:
        prompt = self.fixed_tokens + round(self.fresh_tokens * rng.uniform(0.5, 1.5))
        num_blocks = (prompt + self.output_tokens) // BLOCK
        fresh = tuple(next(keys) for _ in range(num_blocks - len(fixed)))
        gap_s = (self.num_agents - 0.5) * self.step_s
        return Turn(name, fixed + fresh, prompt, self.output_tokens, gap_s, outcome=Outcome.TOOL_CALL, next_gap_s=gap_s)


def forgetting(load: Workload) -> Workload:
    """The same without anything to find in a cache."""
    keys = count(-1, -1)

    def turn(before: Turn) -> Turn:
        return replace(before, keys=tuple(next(keys) for _ in before.keys))

    sessions = (replace(s, turns=tuple(map(turn, s.turns))) for s in load.sessions)
    return replace(load, sessions=tuple(sessions))
