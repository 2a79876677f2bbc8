"""Fingerprints of the segments of a prompt: enough to say later what changed, without keeping its text.

Hashes are Python's own: they hold within one process, which is all that "equal or not" needs. Where their
order counts they are checksums, so that two runs say the same.
"""

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from impala_vllm.workload.source import BAD_JSON

IMAGE_BYTES = 4000
"""What an image counts for: 1,000 tokens at four bytes each. Models differ; their order of size does not."""
KEPT_TEXT = 2048
"""Characters of a segment kept where text is asked for."""
_NUM_WORDS = 16

_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
# Looks at the first character before anything else: nine times as fast as plain alternatives.
_TIME = re.compile(
    r"(?=[0-9A-Z])(?<![0-9A-Za-z])(?:(?=[0-9])(?:"
    r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:[.,]\d+)?)?)?(?: ?(?:Z|UTC|GMT|[+-]\d\d:?\d\d))?"
    r"|\d{1,2}:\d\d(?::\d\d(?:\.\d+)?)?(?: ?[AaPp][Mm]\b)?"
    r"|\d{1,2}[/.]\d{1,2}[/.]\d{2,4}\b"
    rf"|\d{{1,2}} {_MONTH},?(?: \d{{4}})?"
    r"|1[5-9]\d{8}(?:\d{3}){0,3}(?:\.\d+)?\b)"
    r"|(?=[A-Z])(?:"
    rf"{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,?(?: \d{{4}})?"
    r"|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b|(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun),))"
)
_ID = re.compile(r"\b(?=[A-Za-z_-]{0,40}\d)[A-Za-z0-9_-]{8,}")
_DIGITS = re.compile(r"\d+")
_WORD = re.compile(r"\w+")
_SUMMARY = ("summar", "compact", "condens", "conversation so far", "earlier messages", "earlier conversation")


@dataclass(frozen=True, slots=True)
class Print:
    """One segment. Two segments are equal in a respect where the hashes of that name are equal."""

    role: str
    """`tools`, a message's role, or `text` for a part of a rendered prompt."""
    num_bytes: int
    exact: int
    content: int | None
    """Of the text alone, without role and other fields; None where it is empty."""
    fields: int | None
    """Of all but role and text, such as the id of a tool's call; None where there is nothing else."""
    spaceless: int
    canonical: int
    """JSON in it with sorted keys."""
    timeless: int
    """Dates and times masked."""
    nameless: int
    """Times and ids masked."""
    numberless: int
    """Times, ids and digits masked."""
    imageless: int
    bag: int
    """Its words in any order where it holds JSON: keys move inside of text too."""
    words: frozenset[int]
    """The least hashes of its words: a sketch of which there are."""
    members: tuple[int, ...]
    """Of tools: each one, canonical, in order of hash."""
    cuts: tuple[int, ...]
    """Checksums of the first 16, 24, 32, 48, 64, ... bytes."""
    is_summary: bool
    text: str | None
    """The first `KEPT_TEXT` characters, only where asked for."""


def message_print(message: dict[str, Any], keep_text: bool = False) -> Print:
    """Of a chat message. The order of its own keys does not count: templates look fields up by name."""
    text, images = _content(message.get("content"))
    rest = {k: message[k] for k in sorted(message) if k not in ("role", "content") and message[k] not in (None, [], "")}
    role = str(message.get("role", ""))
    extra = _dump(rest) if rest else ""
    canonical = (role, _sorted(text), _sorted(rest))
    return _print(role, text, extra, images, canonical, (), keep_text)


def tools_print(tools: list[Any], keep_text: bool = False) -> Print:
    """Of all tool schemas together."""
    members = tuple(sorted(hash(_sorted(tool)) for tool in tools))
    canonical = tuple(_sorted(tool) for tool in tools)
    return _print("tools", "\n".join(map(_dump, tools)), "", [], canonical, members, keep_text)


def text_print(role: str, text: str, keep_text: bool = False) -> Print:
    """Of a part of a rendered prompt."""
    return _print(role, text, "", [], (role, _sorted(text)), (), keep_text)


def json_bytes(value: Any) -> int:
    """Of a JSON value as a template writes it."""
    return len(_dump(value).encode(errors="surrogatepass"))


def same_bytes(a: Print, b: Print) -> int:
    """About how many leading bytes two segments share: at least two thirds of the true number, from 16 on."""
    shared = 0
    for (length, mine), other in zip(zip(_lengths(), a.cuts, strict=False), b.cuts, strict=False):
        if mine != other:
            break
        shared = length
    return min(shared, a.num_bytes, b.num_bytes)


def similarity(a: Print, b: Print) -> float:
    """Estimated share of words that both have, of those that either has."""
    either = sorted(a.words | b.words)[:_NUM_WORDS]
    return sum(w in a.words and w in b.words for w in either) / len(either) if either else 0.0


def _print(
    role: str, text: str, extra: str, images: list[str], canonical: object, members: tuple[int, ...], keep_text: bool
) -> Print:
    body = f"{text}\x1f{extra}" if extra else text
    data = body.encode(errors="surrogatepass")
    timeless = _TIME.sub("\0", body)
    nameless = _ID.sub("\0", timeless)
    start = text[:KEPT_TEXT].lower()
    words = _WORD.findall(body)
    return Print(
        role=role,
        num_bytes=len(data) + IMAGE_BYTES * len(images),
        exact=hash((role, body, *images)),
        content=hash((text, *images)) if text else None,
        fields=hash(extra) if extra else None,
        spaceless=hash((role, "".join(body.split()), *images)),
        canonical=hash((canonical, *images)),
        timeless=hash((role, timeless, *images)),
        nameless=hash((role, nameless, *images)),
        numberless=hash((role, _DIGITS.sub("\0", nameless), *images)),
        imageless=hash((role, body, len(images))),
        bag=hash((role, sum(map(hash, words)) if '":' in body or '\\":' in body else body, *images)),
        words=frozenset(sorted(zlib.crc32(word.encode(errors="surrogatepass")) for word in set(words))[:_NUM_WORDS]),
        members=members,
        cuts=_cuts(data),
        is_summary=any(sign in start for sign in _SUMMARY),
        text=body[:KEPT_TEXT] if keep_text else None,
    )


def _content(content: Any) -> tuple[str, list[str]]:
    """Text and images. A text and a list of one text are the same to a template."""
    if content is None or isinstance(content, str):
        return content or "", []
    texts: list[str] = []
    images: list[str] = []
    for part in cast("list[Any]", content) if isinstance(content, list) else [content]:
        if isinstance(part, dict):
            fields = cast("dict[str, Any]", part)
            if isinstance(fields.get("text"), str):
                texts.append(fields["text"])
                continue
            if "image" in str(fields.get("type", "")):
                images.append(_dump(fields))
                continue
        texts.append(part if isinstance(part, str) else _dump(part))
    return "\n".join(texts), images


def _cuts(data: bytes) -> tuple[int, ...]:
    found: list[int] = []
    start = checksum = 0
    for length in _lengths():
        if length > len(data):
            break
        checksum = zlib.crc32(data[start:length], checksum)
        start = length
        found.append(checksum)
    return tuple(found)


def _lengths() -> Iterator[int]:
    length = 16
    while True:
        yield length
        yield length + length // 2
        length *= 2


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _sorted(value: Any) -> str:
    """The value with keys sorted, also in texts that are JSON themselves (a tool's arguments)."""
    return json.dumps(_parsed(value), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


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
