"""What prompts carry without need: schemas nobody calls, text twice, images the model shrinks, schemas in prose.

Nothing here breaks a prefix. It is prefilled once a session at best, fills the cache for as long as the
session lives, and is read by attention in every step.
"""

import re
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

from impala_vllm.insight.audit.images import Image
from impala_vllm.insight.audit.requests import Request
from impala_vllm.insight.audit.segment import STEM_ROLES, Segment
from impala_vllm.workload.source import BAD_JSON

MAX_SYSTEMS = 64
_REPEATED_BYTES = 256
"""A shorter text may well be said twice."""
_LOOP_CHARS = 2048
_LINE_CHARS = 40
_LATEST = 3
"""Messages from the end in which an agent is told how to answer."""
_HEADING = re.compile(r"^(?:#{1,3} .+|<([A-Za-z][\w-]*)>)$", re.MULTILINE)
_SECTION_BYTES = 64
_ASKS = re.compile(r"\bJSON\b[^{]{0,400}(?P<shape>\{\s*\"\w+\"\s*:\s*(?:string|boolean|number|integer|\{|\"<|<))")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a system prompt."""

    number: int
    title: str
    """Prompt text: shown only where that is asked for."""
    num_bytes: int


@dataclass(slots=True)
class System:
    """One system prompt and who carried it."""

    num_bytes: int
    text: str
    requests: int = 0

    def sections(self) -> list[Section]:
        """Cut at headings, or at tags on lines of their own. O(text)."""
        starts = [0, *(m.start() for m in _HEADING.finditer(self.text) if m.start())]
        found: list[Section] = []
        for number, (a, b) in enumerate(pairwise([*starts, len(self.text)]), 1):
            size = len(self.text[a:b].encode(errors="surrogatepass"))
            if size >= _SECTION_BYTES:
                found.append(Section(number, self.text[a:b].strip().partition("\n")[0][:60], size))
        return found


@dataclass(slots=True)
class Bloat:
    """Sums over the log. Memory: at most `MAX_SYSTEMS` system prompts, and numbers."""

    repeated_bytes: int = 0
    """In the last prompt of each session, what stood in it before."""
    repeating_sessions: int = 0
    looped_bytes: int = 0
    """Lines that a message says over and over, where it is half made of them."""
    looped: int = 0
    images: int = 0
    image_tokens: int = 0
    large_images: int = 0
    prose_schemas: int = 0
    """Requests that describe the JSON they want in words, with no `response_format`, and got JSON."""
    prose_bytes: int = 0
    _systems: OrderedDict[int, System] = field(default_factory=OrderedDict)
    _asking: OrderedDict[int, int] = field(default_factory=OrderedDict)

    def note(self, request: Request, segments: Sequence[Segment], fresh: Sequence[Segment]) -> None:
        """One request; `fresh` are the segments that its session had not had."""
        for segment in segments:
            if segment.role not in STEM_ROLES:
                break
            if segment.role != "tools":
                self._carried(segment)
        for segment in fresh:
            self._pictures(segment.images)
            size = _looped(segment.text)
            self.looped_bytes += size
            self.looped += size > 0
        if not request.has_format and request.tools is None:
            for segment in [*segments[:1], *segments[-_LATEST:]]:
                size = self._asks(segment)
                if size and _is_json(request.output):
                    self.prose_schemas += 1
                    self.prose_bytes += size
                    break

    def repeats(self, num_bytes: int) -> None:
        """A session ended with so much twice in its last prompt."""
        self.repeated_bytes += num_bytes
        self.repeating_sessions += num_bytes > 0

    def systems(self) -> list[System]:
        """Those carried most, by bytes times requests."""
        return sorted(self._systems.values(), key=lambda s: -s.num_bytes * s.requests)

    def _carried(self, segment: Segment) -> None:
        system = self._systems.get(segment.exact)
        if system is None:
            system = self._systems[segment.exact] = System(segment.num_bytes, segment.text)
            if len(self._systems) > MAX_SYSTEMS:
                rarest = min(list(self._systems)[:-1], key=lambda key: self._systems[key].requests)
                del self._systems[rarest]
        system.requests += 1

    def _pictures(self, images: Sequence[Image]) -> None:
        self.images += len(images)
        self.image_tokens += sum(image.tokens for image in images)
        self.large_images += sum(image.is_too_large for image in images)

    def _asks(self, segment: Segment) -> int:
        """Bytes of the shape of an answer that a segment describes in words."""
        size = self._asking.get(segment.exact)
        if size is None:
            found = _ASKS.search(segment.text) if "JSON" in segment.text else None
            size = self._asking[segment.exact] = 0 if found is None else _braces(segment.text, found.start("shape"))
            if len(self._asking) > 1024:
                self._asking.popitem(last=False)
        return size


def repeated(segments: Sequence[Segment]) -> int:
    """Bytes of what stands in a prompt a second time."""
    sizes: Counter[int] = Counter()
    total = 0
    for segment in segments:
        if segment.num_bytes >= _REPEATED_BYTES and segment.contents is not None:
            sizes[segment.contents] += 1
            if sizes[segment.contents] > 1:
                total += segment.num_bytes
    return total


def _looped(text: str) -> int:
    """Bytes of lines said before in the same text, if those are half of it: a model caught in a loop."""
    if len(text) < _LOOP_CHARS:
        return 0
    seen: set[str] = set()
    total = 0
    for line in text.split("\n"):
        if len(line) >= _LINE_CHARS:
            if line in seen:
                total += len(line)
            seen.add(line)
    return total if 2 * total >= len(text) else 0


def _braces(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at + 1 - start
    return len(text) - start


def _is_json(output: Any) -> bool:
    text = output.get("content") if isinstance(output, dict) else output
    if not isinstance(text, str):
        return False
    text = text.strip().removeprefix("```json").removesuffix("```").strip()
    try:
        return isinstance(msgspec.json.decode(text.encode(errors="surrogatepass")), dict)
    except BAD_JSON:
        return False
