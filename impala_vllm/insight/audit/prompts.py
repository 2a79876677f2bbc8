"""Requests into prompts, with what a session already knows: only what is new is decoded and looked at."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from impala_vllm.insight.audit import segment
from impala_vllm.insight.audit.compare import Prompt
from impala_vllm.insight.audit.requests import Request
from impala_vllm.insight.audit.schemas import Schemas
from impala_vllm.insight.audit.segment import Segment

_MARKERS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|start|>")
"""What begins a message in ChatML, Llama 3, Gemma and Harmony; the role follows."""
_ROLE = re.compile(r"\w+")
_HEADER = re.compile(
    r"<\|im_start\|>\w+\n|<\|start_header_id\|>\w+<\|end_header_id\|>\s*|<start_of_turn>\w+\n"
    r"|<\|start\|>\w+[^<]{0,80}(?:<\|channel\|>\w+)?<\|message\|>|\s*\w+: "
)
_PLAIN_ROLE = re.compile(r"(?:system|developer|user|assistant|tool): ")
_PLAIN_TURN = re.compile(r"\n\n(?=(?:system|developer|user|assistant|tool): )")
_PARAGRAPH = re.compile(r"\n\n+")
_SHORT = 64
"""A paragraph with fewer characters belongs to the one before it: it recurs too often to tell where one is."""

_SHARED = 1000
"""Schemas and first messages remembered over all sessions."""


class Prompts:
    """Turns requests into prompts. Owns a cache of what is alike over sessions: schemas and first messages."""

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self._firsts: dict[int, Segment] = {}
        self._tools: dict[int, tuple[Segment, tuple[str, ...]] | None] = {}

    def of(
        self, request: Request, known: Mapping[int, Segment], heads: Iterable[Prompt]
    ) -> tuple[Prompt, dict[int, Segment]]:
        """The prompt, and its segments by hash of raw message. Raises DecodeError or ValidationError.

        `known` are segments of the session, `heads` its prompts.
        """
        found: dict[int, Segment] = {}
        segments: list[Segment] = []
        if request.tools is not None:
            tools = self._of_tools(request.tools)
            if tools is not None:
                segments.append(tools)
        tail_chars = None
        continued: frozenset[int] = frozenset()
        if request.text:
            cut = parts(request.text)
            for role, part in cut:
                h = hash((role, part))
                segments.append(found.setdefault(h, known.get(h) or _rendered(role, part)))
            tail_chars = len(cut[-1][1])
            continued = _continued(request.text, cut, heads)
        for number, (raw, h) in enumerate(zip(request.messages, request.keys, strict=True)):
            one = found.get(h) or known.get(h) or self._firsts.get(h)
            if one is None:
                message = msgspec.json.decode(raw, type=dict[str, Any])
                self._schemas.called(message)
                one = segment.of_message(message)
                if number == 0:
                    if len(self._firsts) > _SHARED:  # another in every request: nothing to gain from them
                        self._firsts.clear()
                    self._firsts[h] = one
            found[h] = one
            segments.append(one)
        return Prompt(tuple(segments), request.model, request.salt, tail_chars, continued), found

    def _of_tools(self, raw: msgspec.Raw) -> Segment | None:
        h = hash(bytes(raw))
        if h not in self._tools:
            tools = msgspec.json.decode(raw, type=list[Any] | None)
            if len(self._tools) > _SHARED:
                self._tools.clear()
            self._tools[h] = (segment.of_tools(tools), self._schemas.learn(tools)) if tools else None
        known = self._tools[h]
        if known is None:
            return None
        self._schemas.carried(known[1])
        return known[0]


def parts(text: str) -> list[tuple[str, str]]:
    """A rendered prompt in parts with their roles: its messages where it has markers of them, else paragraphs."""
    marker = next((marker for marker in _MARKERS if marker in text), None)
    if marker is not None and text.count(marker) > 1:
        head, *turns = text.split(marker)
        found = [(_role(turn), marker + turn) for turn in turns]
        return [("paragraph", head), *found] if head else found
    if _PLAIN_ROLE.match(text):
        starts = [0, *(turn.start() for turn in _PLAIN_TURN.finditer(text))]
        ends = [*starts[1:], len(text)]
        return [(text[a:b].lstrip().partition(":")[0], text[a:b]) for a, b in zip(starts, ends, strict=True)]
    gaps = [gap.start() for gap in _PARAGRAPH.finditer(text) if gap.start() > 0 and gap.end() < len(text)]
    starts = [0]
    for start, end in zip(gaps, [*gaps[1:], len(text)], strict=False):
        if end - start >= _SHORT:
            starts.append(start)
    return [("paragraph", text[a:b]) for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def _rendered(role: str, part: str) -> Segment:
    header = None if role == "paragraph" else _HEADER.match(part)
    return Segment(role, part, header_chars=0 if header is None else header.end())


def _role(turn: str) -> str:
    found = _ROLE.match(turn)
    return "message" if found is None else found[0]


def _continued(text: str, cut: list[tuple[str, str]], heads: Iterable[Prompt]) -> frozenset[int]:
    """Last segments of the session's prompts that `text` holds in their place and goes on after."""
    found: set[int] = set()
    places = [0]
    for _, part in cut:
        places.append(places[-1] + len(part))
    for head in heads:
        index = len(head.segments) - 1
        if head.tail_chars is not None and 0 <= index < len(cut):
            last = head.segments[-1]
            if last.role == cut[index][0] and text.startswith(last.body, places[index]):
                found.add(last.exact)
    return frozenset(found)
