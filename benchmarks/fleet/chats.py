"""Sessions as clients send them: chats that grow turn by turn, without ids, and the gaps between their turns.

Recorded ones say the same where the recording had the same blocks: each recorded block is a fixed run of words, one a
token. A message ends where a recorded prompt ended, so that a next prompt repeats the messages of the one before it.
"""

from collections.abc import Sequence
from hashlib import blake2b
from importlib import resources
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

from benchmarks.fleet.sessions import Step
from impala_vllm.fleet.hashing import Tokenizer
from impala_vllm.fleet.places import BlockKey

Messages = list[dict[str, Any]]


class Ask(NamedTuple):
    """A turn."""

    gap_s: float
    """After the turn before it."""
    messages: Messages
    num_output: int


WORDS = 16
"""A recorded block's: those of a block of an emulated server."""


class Words:
    """Text for blocks: the same for the same block."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        text = resources.files("impala_vllm.replay").joinpath("data", "tokenizer_text.txt").read_text("utf-8")
        known = sorted({word for word in text.split() if word.isascii() and word.isalpha()})
        self._words = [word for word in known if len(tokenizer.encode(" " + word)) == 1]
        self._texts: dict[BlockKey, str] = {}

    def of(self, key: BlockKey) -> str:
        """Begins with a space."""
        text = self._texts.get(key)
        if text is None:
            drawn = blake2b(key.to_bytes(8, "big"), digest_size=2 * WORDS).digest()
            numbers = [int.from_bytes(drawn[i : i + 2], "big") for i in range(0, len(drawn), 2)]
            text = self._texts[key] = "".join(" " + self._words[n % len(self._words)] for n in numbers)
        return text


def recorded(steps: Sequence[Step], words: Words, scale: int, speed: float) -> list[Ask]:
    """A recorded session; outputs are shorter by `scale`, gaps by `speed`."""
    ends = {step.keys[-1] for step in steps if step.keys}
    return [
        Ask(step.gap_s / speed, _messages(step.keys, ends, words), max(1, round(step.num_output / scale)))
        for step in steps
    ]


def _messages(keys: Sequence[BlockKey], ends: set[BlockKey], words: Words) -> Messages:
    """From one recorded end to the next: an answer and what was asked then; the system prompt and a task at first."""
    if not keys:
        return [{"role": "user", "content": "Go on."}]
    cuts = [0, *(i + 1 for i, key in enumerate(keys) if key in ends)]
    if cuts[-1] < len(keys):
        cuts.append(len(keys))
    messages: Messages = []
    for start, end in pairwise(cuts):
        opening = [("assistant" if start else "system", keys[start : start + 1])] if end - start > 1 else []
        for role, part in (*opening, ("user", keys[start + len(opening) : end])):
            messages.append({"role": role, "content": "".join(map(words.of, part))})
    return messages


_SPOKEN = ("open", "the", "file", "then", "def", "run", "test_case", "return", "value", "=", "12", "(x, y):")


def agent(num_turns: int, lot: Random) -> list[Ask]:
    """A synthetic one: a shared system prompt, turns of 100 to 900 words, gaps of a second."""
    messages: Messages = [{"role": "system", "content": "You are an agent. Tools follow. " * 150}]
    asked: list[Ask] = []
    for turn in range(num_turns):
        messages.append({"role": "user", "content": " ".join(lot.choices(_SPOKEN, k=lot.randrange(100, 900)))})
        asked.append(Ask(lot.expovariate(1.0) if turn else 0.0, list(messages), 8))
        messages.append({"role": "assistant", "content": "word " * 8})
    return asked
