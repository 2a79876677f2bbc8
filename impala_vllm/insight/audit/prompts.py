"""Requests into fingerprints, with what a session already knows: only what is new is decoded and looked at."""

import re
from typing import Any

import msgspec

from impala_vllm.insight.audit.compare import Prompt
from impala_vllm.insight.audit.prints import Print, message_print, text_print, tools_print
from impala_vllm.insight.audit.requests import Request
from impala_vllm.insight.audit.schemas import Schemas
from impala_vllm.insight.audit.sessions import Session

_TURN = re.compile(r"(?=<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>)")
_PARAGRAPH = re.compile(r"\n\n+")
_SHORT = 64
"""A paragraph with fewer characters belongs to the one before it: it recurs too often to tell where one is."""

_SHARED = 1000
"""Schemas and first messages remembered over all sessions."""


class Prompts:
    """Turns requests into prompts. Owns a cache of what is alike over sessions: schemas and first messages."""

    def __init__(self, schemas: Schemas, keep_text: bool) -> None:
        self._schemas = schemas
        self._keep_text = keep_text
        self._firsts: dict[int, Print] = {}
        self._tools: dict[int, tuple[Print, tuple[str, ...]]] = {}

    def of(self, request: Request, session: Session) -> tuple[Prompt, dict[int, Print]]:
        """The prompt, and its fingerprints by hash of raw message. Raises DecodeError or ValidationError."""
        found: dict[int, Print] = {}
        segments: list[Print] = []
        if request.tools is not None:
            tools = self._of_tools(request.tools)
            if tools is not None:
                segments.append(tools)
        tail_chars = None
        continued: set[int] = set()
        if request.text:
            places = [0]
            role, cut = parts(request.text)
            for part in cut:
                h = hash((role, part))
                segments.append(found.setdefault(h, session.known.get(h) or text_print(role, part, self._keep_text)))
                places.append(places[-1] + len(part))
            tail_chars = places[-1] - places[-2]
            continued = _continued(request.text, role, places, session)
        for number, raw in enumerate(request.messages):
            h = hash(bytes(raw))
            known = found.get(h) or session.known.get(h) or self._firsts.get(h)
            if known is None:
                message = msgspec.json.decode(raw, type=dict[str, Any])
                self._schemas.called(message)
                known = message_print(message, self._keep_text)
                if number == 0:
                    if len(self._firsts) > _SHARED:  # another in every request: nothing to gain from them
                        self._firsts.clear()
                    self._firsts[h] = known
            found[h] = known
            segments.append(known)
        if isinstance(request.output, dict):
            self._schemas.called(request.output)
        return Prompt(tuple(segments), request.model, request.salt, tail_chars, frozenset(continued)), found

    def _of_tools(self, raw: msgspec.Raw) -> Print | None:
        h = hash(bytes(raw))
        known = self._tools.get(h)
        if known is None:
            tools = msgspec.json.decode(raw, type=list[Any] | None)
            if not tools:
                return None
            if len(self._tools) > _SHARED:
                self._tools.clear()
            known = self._tools[h] = tools_print(tools, self._keep_text), self._schemas.learn(tools)
        self._schemas.carried(known[1])
        return known[0]


def parts(text: str) -> tuple[str, list[str]]:
    """A rendered prompt in parts and what they are: its messages where it has markers of them, else paragraphs."""
    turns = [turn for turn in _TURN.split(text) if turn]
    if len(turns) > 1:
        return "message", turns
    gaps = [gap.start() for gap in _PARAGRAPH.finditer(text) if gap.start() > 0 and gap.end() < len(text)]
    starts = [0]
    for start, end in zip(gaps, [*gaps[1:], len(text)], strict=False):
        if end - start >= _SHORT:
            starts.append(start)
    return "paragraph", [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def _continued(text: str, role: str, places: list[int], session: Session) -> set[int]:
    """Last segments of the session's prompts that `text` holds in their place and goes on after."""
    found: set[int] = set()
    for head in session.tails():
        index = len(head.segments) - 1
        if index < len(places) - 1 and head.tail_chars is not None:
            exact = head.segments[-1].exact
            if hash((role, text[places[index] : places[index] + head.tail_chars])) == exact:
                found.add(exact)
    return found
