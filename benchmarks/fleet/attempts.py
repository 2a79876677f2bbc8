"""Arms in turn, repetition by repetition, whatever becomes of one of them.

Every second repetition goes backwards. What fails is done once more, everything anew; who fails twice in a row is asked
no further, and keeps what there is of it. Why is kept, in words that name no place of this machine.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence

from benchmarks.fleet.outcome import Outcome

ATTEMPTS = 2
_FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/:'\"]+/)+")


class Attempts:
    """What came of each arm. `left_out`: arms that could not be started, and why."""

    def __init__(self, names: Sequence[str], left_out: Mapping[str, str]) -> None:
        self._found: dict[str, dict[int, Outcome]] = {name: {} for name in names}
        self._num_whole = 0
        self._dropped: set[str] = set()
        self.faults: dict[str, str] = dict(left_out)
        """Why there is less of an arm than of others: the last cause."""
        self.again: list[str] = []
        """What was done twice, and why."""

    @property
    def found(self) -> dict[str, dict[int, Outcome]]:
        """By arm and number, of the repetitions that came to their end."""
        return {
            name: {number: outcome for number, outcome in outcomes.items() if number < self._num_whole}
            for name, outcomes in self._found.items()
        }

    def run(self, one: Callable[[str, int], Outcome], repetitions: int) -> None:
        """All of them; `one` is an arm, once. Whatever it raises is that arm's failure; interrupts are not its own."""
        for number in range(repetitions):
            names = [name for name in self._found if name not in self._dropped]
            for name in names if number % 2 == 0 else reversed(names):
                self._attempt(one, name, number)
            self._num_whole = number + 1

    def _attempt(self, one: Callable[[str, int], Outcome], name: str, number: int) -> None:
        outcome, faults = None, list[str]()
        while len(faults) < ATTEMPTS:
            try:
                outcome = one(name, number)
            except Exception as e:  # a benchmark of an hour ends for no single one of its forty runs
                fault = said(e)
            else:
                self._found[name][number] = outcome
                if outcome.is_whole():
                    break
                fault = f"{outcome.failures} turns failed at {outcome.servers_used} servers"
            faults.append(fault)
            print(f"{name}: repetition {number}, attempt {len(faults)}: {fault}", file=sys.stderr, flush=True)
        if faults:
            self.again.append(f"{name} in {number}: {faults[0]}")
        if len(faults) == ATTEMPTS:
            self.faults[name] = faults[-1]
            if outcome is None:
                self._dropped.add(name)


def said(error: Exception) -> str:
    """In one line that can be committed."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return _FOLDERS.sub("", line)[:200]
