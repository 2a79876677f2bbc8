"""The model's tokenizer and chat template, cut into pieces that can be tokenised one by one.

Added tokens split a text before anything else looks at it, so what stands between two of them has the same tokens
wherever it stands. That makes tokenising incremental: a turn's new messages, not its history. Proved on a sample when
the tokenizer is loaded; one that does not keep to it is given whole texts.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from impala_vllm.fleet.hashing import chat

_SAMPLE = "Hello  world, naïve 你好\n\n\tdef f(x):  return x ** 2 # 1234567 "


class TokenizerError(ValueError):
    """No tokenizer there, or not a usable one; one line."""


class Tokenizer:
    """Thread-safe: nothing changes after loading."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        """Load from a directory, or by a model's name. Takes seconds. Raises TokenizerError."""
        try:
            import transformers
        except ImportError as e:
            raise TokenizerError("no tokenizer without transformers; `pip install transformers`") from e
        library: Any = transformers
        try:
            self._whole: Any = library.AutoTokenizer.from_pretrained(name, revision=revision)
            self._backend: Any = self._whole.backend_tokenizer
        except Exception as e:  # transformers raises whatever its loaders raise
            reason = " ".join(str(e).split())[:200]
            raise TokenizerError(f"{name}: cannot load its tokenizer ({reason}); give --tokenizer a directory") from e
        self.template: str = _template(self._whole)
        self.tool_template: str = _template(self._whole, "tool_use") or self.template
        """For chats with tools."""
        self.variables = chat.names_in(self.template) | chat.names_in(self.tool_template)
        """What the templates look at."""
        self.leading, self.trailing = self._around()
        self._separators = self._find_separators()

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> str:
        """The chat as the model sees it. Raises TokenizerError where the template refuses."""
        try:
            return self._whole.apply_chat_template(list(messages), tools=tools, tokenize=False, **variables)
        except Exception as e:  # jinja's errors, and those of Python inside a template
            raise TokenizerError("the chat template refuses the messages") from e

    def pieces(self, text: str) -> list[str]:
        """Cut the text; the tokens of the pieces in a row are the tokens of the text."""
        return [piece for piece in self._separators.split(text) if piece] if self._separators is not None else [text]

    def encode(self, text: str) -> list[int]:
        """The tokens, nothing put around them."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def _around(self) -> tuple[list[int], list[int]]:
        """What is put before and after a completion's prompt."""
        inside = self.encode(_SAMPLE)
        outside: list[int] = self._backend.encode(_SAMPLE, add_special_tokens=True).ids
        for start in range(len(outside) - len(inside) + 1):
            if outside[start : start + len(inside)] == inside:
                return outside[:start], outside[start + len(inside) :]
        raise TokenizerError("its special tokens change the text between them; such tokenizers are not supported")

    def _find_separators(self) -> re.Pattern[str] | None:
        has_normaliser = self._backend.normalizer is not None
        texts = [
            token.content
            for token in self._whole.added_tokens_decoder.values()
            if token.content
            and not (token.lstrip or token.rstrip or token.single_word or (token.normalized and has_normaliser))
        ]
        if not texts:
            return None
        found = re.compile("(" + "|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)) + ")")
        sample = _SAMPLE + "".join(f"{text}{_SAMPLE}" for text in texts[:32]) + "".join(texts[:32])
        cut = [token for piece in found.split(sample) if piece for token in self.encode(piece)]
        return found if cut == self.encode(sample) else None


def _template(tokenizer: Any, name: str = "default") -> str:
    template: Any = tokenizer.chat_template
    if not isinstance(template, str):  # several by name, or none
        template = cast("dict[str, str]", template or {}).get(name, "")
    return template
