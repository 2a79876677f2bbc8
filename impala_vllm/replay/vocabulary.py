"""Which token ids a replay may use with a model: plain ones for text, and the few with a meaning.

Read from the files of a model directory (config.json, tokenizer.json); no tokenizer library needed.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast


class ModelError(ValueError):
    """A model directory that cannot be used, in one line."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Ids by meaning. Plain ids are [first_plain, last_plain]."""

    first_plain: int
    last_plain: int
    eos: int
    tool_call: int | None
    """Opens a tool call where the model has a token for it."""

    def text(self, key: str, num_tokens: int) -> tuple[int, ...]:
        """`num_tokens` plain ids that depend on `key` only; a longer text starts with the shorter one."""
        span = self.last_plain - self.first_plain + 1
        ids: list[int] = []
        counter = 0
        while len(ids) < num_tokens:
            digest = hashlib.blake2b(f"{key}/{counter}".encode()).digest()
            ids += [self.first_plain + int.from_bytes(digest[i : i + 4], "big") % span for i in range(0, 64, 4)]
            counter += 1
        return tuple(ids[:num_tokens])

    @classmethod
    def of_model(cls, directory: Path) -> "Vocabulary":
        """Read it from a model directory. Raises ModelError with one line."""
        config = _read(directory / "config.json")
        tokenizer = _read(directory / "tokenizer.json")
        added = cast("list[dict[str, Any]]", tokenizer.get("added_tokens") or [])
        special = {int(t["id"]): str(t["content"]) for t in added}
        eos = config.get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) else eos
        if not isinstance(eos, int):
            raise ModelError(f"{directory / 'config.json'}: no eos_token_id; give a model that ends its turns")
        known = cast("dict[str, int]", tokenizer.get("model", {}).get("vocab") or {})
        size = min(int(config["vocab_size"]), max(known.values(), default=0) + 1)
        # The longest run of ids without a special one: byte-level vocabularies keep the specials at
        # either end.
        fences = sorted({-1, size, *(i for i in (*special, eos) if i < size)})
        low, high = max(pairwise(fences), key=lambda pair: pair[1] - pair[0])
        tool_call = next((i for i, text in special.items() if text == "<tool_call>"), None)
        return cls(low + 1, high - 1, eos, tool_call)


def _read(path: Path) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot read it ({e}); give a complete model directory") from e
