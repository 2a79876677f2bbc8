"""What prompts carry without need: schemas nobody calls, text twice, images the model shrinks, schemas in prose.

Nothing here breaks a prefix. It is prefilled once a session at best, fills the cache for as long as the
session lives, and is read by attention in every step.
"""

import re
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from impala_vllm.insight.audit.images import MAX_TOKENS, Image
from impala_vllm.insight.audit.requests import Request
from impala_vllm.insight.audit.segment import Segment
from impala_vllm.insight.audit.systems import Systems
from impala_vllm.workload.source import BAD_JSON

_REPEATED_BYTES = 256
"""A shorter text may well be said twice."""
_LOOP_CHARS = 2048
_LINE_CHARS = 40
_LATEST = 3
"""Messages from the end in which an agent is told how to answer."""
_ASKS = re.compile(r"\bJSON\b[^{]{0,400}(?P<shape>\{\s*\"\w+\"\s*:\s*(?:string|boolean|number|integer|\{|\"<|<))")


class Bloat(Enum):
    """What a prompt carries without need."""

    IDLE_TOOLS = "tools never called"
    REPEATED = "said twice"
    LOOPED = "caught in a loop"
    LARGE_IMAGES = "images too large"
    PROSE_SCHEMA = "schema in words"


FIXES = {
    Bloat.IDLE_TOOLS: "Leave them out, or offer them through one tool that finds tools.",
    Bloat.REPEATED: "Refer to the first, or drop it when the history is compacted anyway.",
    Bloat.LOOPED: "Cut such an answer before it goes into a prompt; set max_tokens or a repetition penalty.",
    Bloat.LARGE_IMAGES: f"Scale them down to what {MAX_TOKENS:,} tokens show before they are sent.",
    Bloat.PROSE_SCHEMA: "Give the schema in `response_format`: fewer tokens, and the answer is sure to parse.",
}


@dataclass(frozen=True, slots=True)
class Waste:
    """One kind of bloat over the log."""

    kind: Bloat
    number: int
    """Of tools, sessions, texts, images, requests."""
    num_bytes: int
    """Once each: not times the requests that carried it."""


@dataclass(slots=True)
class Carried:
    """Sums over the log. Memory: what `Systems` keeps."""

    systems: Systems = field(default_factory=Systems)
    repeated_bytes: int = 0
    """In the last prompt of each session, what stood in it before."""
    repeating_sessions: int = 0
    looped_bytes: int = 0
    """Lines that a message says over and over, where it is half made of them."""
    looped: int = 0
    images: int = 0
    image_tokens: int = 0
    large_images: int = 0
    large_bytes: int = 0
    """Of the text that would fill as many tokens as the large ones."""
    prose_schemas: int = 0
    """Requests that describe the JSON they want in words, with no `response_format`, and got JSON."""
    prose_bytes: int = 0
    _asking: OrderedDict[int, int] = field(default_factory=OrderedDict)

    def note(self, request: Request, segments: Sequence[Segment], fresh: Sequence[Segment]) -> None:
        """One request; `fresh` are the segments that its session had not had."""
        self.systems.carried(segments)
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

    def wastes(self) -> list[Waste]:
        """What there is of each kind but idle tools, which `Schemas` knows."""
        found = [
            Waste(Bloat.REPEATED, self.repeating_sessions, self.repeated_bytes),
            Waste(Bloat.LOOPED, self.looped, self.looped_bytes),
            Waste(Bloat.LARGE_IMAGES, self.large_images, self.large_bytes),
            Waste(Bloat.PROSE_SCHEMA, self.prose_schemas, self.prose_bytes),
        ]
        return [waste for waste in found if waste.number]

    def _pictures(self, images: Sequence[Image]) -> None:
        self.images += len(images)
        self.image_tokens += sum(image.tokens for image in images)
        large = [image for image in images if image.is_too_large]
        self.large_images += len(large)
        self.large_bytes += sum(image.num_bytes for image in large)

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
