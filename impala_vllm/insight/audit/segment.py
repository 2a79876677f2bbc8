"""One segment of a prompt: the tools, a message, or a part of a rendered text.

Two are equal where `exact` is. In what respects two that differ are still alike is worked out only when
somebody asks: a log that only grows never does. Hashes are Python's own and hold within one process.
"""

import html
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import msgspec

from impala_vllm.insight.audit.images import Image
from impala_vllm.insight.audit.images import read as read_image
from impala_vllm.workload.source import BAD_JSON

STEM_ROLES = ("tools", "system", "developer")
"""What sessions of one program have in common."""
OVERHEAD_BYTES = 600
"""What a segment takes beside its text."""
_WORD = re.compile(r"\w+")
_NO_LETTERS = bytes(c for c in range(128) if not chr(c).isalpha())
_LEAST_LETTERS = 16
"""Fewer are said everywhere."""
_THOUGHT = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL)
_UNICODE = re.compile(r"\\u([0-9a-fA-F]{4})")
_ESCAPED_SPACE = re.compile(r"\\+[nrt]")
_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})
_SUMMARY = re.compile(
    r"summar|compact|condens|conversation so far|earlier (?:messages|conversation)|previous conversation"
    r"|ran out of context|hand-?off",
    re.IGNORECASE,
)
_SUMMARY_CHARS = 2048
"""A summary says so at its start."""


class Segment:
    """What a template writes for one part of a request."""

    def __init__(
        self, role: str, text: str, extra: str = "", images: Sequence[Image] = (), header_chars: int = 0
    ) -> None:
        self.role = role
        """`tools`, a message's role, or `paragraph`."""
        self.text = text
        self.header_chars = header_chars
        """Of a rendered text: what names the role at the start of `text`."""
        self.extra = extra
        """All but role, text and images, as one line of JSON."""
        self.images = tuple(images)
        self.body = f"{text}\x1f{extra}" if extra else text
        self.exact = hash((role, self.body, self._pictures))
        chars = len(self.body) if self.body.isascii() else len(self.body.encode(errors="surrogatepass"))
        self.num_bytes = chars + sum(image.num_bytes for image in self.images)
        self.held_bytes = OVERHEAD_BYTES + chars

    @property
    def _pictures(self) -> tuple[int, ...]:
        return tuple(image.digest for image in self.images)

    @cached_property
    def imageless(self) -> int:
        """Equal but for what the images show."""
        return hash((self.role, self.body, len(self.images)))

    @cached_property
    def contents(self) -> int | None:
        """Text and images without role and other fields; None where there is none."""
        text = self.text[self.header_chars :].strip() if self.header_chars else self.text
        return hash((text, self._pictures)) if text or self.images else None

    @cached_property
    def fields(self) -> int | None:
        """The other fields, such as the id of a tool's call; None where there are none."""
        return hash(self.extra) if self.extra else None

    @cached_property
    def spaceless(self) -> int:
        """Equal but for white space, also where it is escaped in a tool's arguments."""
        extra = _ESCAPED_SPACE.sub("", self.extra)
        return hash((self.role, "".join(self.text.split()), "".join(extra.split()), self._pictures))

    @cached_property
    def canonical(self) -> int:
        """Equal but for the order of keys and the spaces of JSON."""
        if self.role == "tools":
            return hash(self._schemas)
        extra = msgspec.json.decode(self.extra) if self.extra else None
        return hash((self.role, _sorted(self.text), _sorted(extra), self._pictures))

    @cached_property
    def ordered(self) -> int:
        """Equal but for how JSON is escaped and spaced."""
        return hash((self.role, _dump(_parsed(self.text)), self.extra, self._pictures))

    @cached_property
    def members(self) -> tuple[int, ...]:
        """Of tools: each one, canonical, whatever their order."""
        return tuple(sorted(self._schemas))

    @cached_property
    def _schemas(self) -> tuple[int, ...]:
        return tuple(hash(_keyed(msgspec.json.decode(tool))) for tool in self.text.split("\n"))

    @cached_property
    def bag(self) -> int:
        """Equal but for the order of words where it holds JSON: keys move inside of text too."""
        holds_json = '":' in self.body or '\\":' in self.body
        return hash((self.role, tuple(sorted(_WORD.findall(self.body))) if holds_json else self.body, self._pictures))

    @cached_property
    def rendering(self) -> int | None:
        """What it says, however escaped, spaced, accented or thought about; None where it says nothing."""
        text = _UNICODE.sub(lambda m: chr(int(m[1], 16)), _THOUGHT.sub("", self.text))
        text = unicodedata.normalize("NFKC", html.unescape(text)).translate(_PLAIN)
        text = "".join(_ESCAPED_SPACE.sub("", text).replace("\\", "").split())
        return hash((text, self._pictures)) if text or self.images else None

    @cached_property
    def letters(self) -> int | None:
        """Its letters alone: what finds a message again that was spaced, dated or numbered anew."""
        letters = self.text.encode(errors="surrogatepass").translate(None, _NO_LETTERS)
        return hash(letters) if len(letters) >= _LEAST_LETTERS else None

    @cached_property
    def words(self) -> frozenset[str]:
        """Which there are."""
        return frozenset(_WORD.findall(self.body))

    @cached_property
    def is_summary(self) -> bool:
        """Whether it calls itself one."""
        return _SUMMARY.search(self.text, 0, _SUMMARY_CHARS) is not None


def of_message(message: dict[str, Any]) -> Segment:
    """Of a chat message. The order of its own keys does not count: templates look fields up by name."""
    text, images = _content(message.get("content"))
    rest = {k: message[k] for k in sorted(message) if k not in ("role", "content") and message[k] not in (None, [], "")}
    return Segment(str(message.get("role", "")), text, _dump(rest) if rest else "", images)


def of_tools(tools: list[Any]) -> Segment:
    """Of all tool schemas together, a line each."""
    return Segment("tools", "\n".join(map(_dump, tools)))


def json_bytes(value: Any) -> int:
    """Of a JSON value as a template writes it."""
    return len(msgspec.json.encode(value))


def similarity(a: Segment, b: Segment) -> float:
    """Share of words that both have, of those that either has."""
    both = len(a.words & b.words)
    either = len(a.words) + len(b.words) - both
    return both / either if either else 0.0


def _content(content: Any) -> tuple[str, list[Image]]:
    """Text and images. A text and a list of one text are the same to a template."""
    if content is None or isinstance(content, str):
        return content or "", []
    texts: list[str] = []
    images: list[Image] = []
    for part in cast("list[Any]", content) if isinstance(content, list) else [content]:
        if isinstance(part, dict):
            fields = cast("dict[str, Any]", part)
            if isinstance(fields.get("text"), str):
                texts.append(fields["text"])
                continue
            if "image" in str(fields.get("type", "")):
                images.append(read_image(_dump(fields)))
                continue
        texts.append(part if isinstance(part, str) else _dump(part))
    return "\n".join(texts), images


def _dump(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _keyed(value: Any) -> bytes:
    """With keys sorted."""
    return msgspec.json.encode(value, order="sorted")


def _sorted(value: Any) -> bytes:
    """With keys sorted, also in texts that are JSON themselves (a tool's arguments)."""
    return _keyed(_parsed(value))


def _parsed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _parsed(v) for k, v in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_parsed(v) for v in cast("list[Any]", value)]
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return msgspec.json.decode(value.encode(errors="surrogatepass"))
        except BAD_JSON:
            return value
    return value
