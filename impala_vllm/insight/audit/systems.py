"""What system prompts weigh, section by section, and how many requests carry them."""

import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from impala_vllm.insight.audit.segment import STEM_ROLES, Segment

MAX_SYSTEMS = 64
_HEADING = re.compile(r"^(?:#{1,3} .+|<([A-Za-z][\w-]*)>)$", re.MULTILINE)
_SECTION_BYTES = 64
_TITLE_CHARS = 60


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a system prompt."""

    number: int
    title: str
    """Prompt text: shown only where that is asked for."""
    num_bytes: int


@dataclass(slots=True)
class System:
    """One system prompt and how many requests carried it."""

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
                title = self.text[a:b].strip().partition("\n")[0]
                found.append(Section(number, title[:_TITLE_CHARS], size))
        return found


class Systems:
    """Counts system prompts. Memory: at most `MAX_SYSTEMS` of them; one that few carried goes first."""

    def __init__(self) -> None:
        self._systems: OrderedDict[int, System] = OrderedDict()

    def carried(self, segments: Iterable[Segment]) -> None:
        """A request had these."""
        for segment in segments:
            if segment.role not in STEM_ROLES:
                break
            if segment.role != "tools":
                self._carried(segment)

    def by_weight(self) -> list[System]:
        """Those carried most first, by bytes times requests."""
        return sorted(self._systems.values(), key=lambda s: -s.num_bytes * s.requests)

    def _carried(self, segment: Segment) -> None:
        system = self._systems.get(segment.exact)
        if system is None:
            system = self._systems[segment.exact] = System(segment.num_bytes, segment.text)
            if len(self._systems) > MAX_SYSTEMS:
                rarest = min(list(self._systems)[:-1], key=lambda key: self._systems[key].requests)
                del self._systems[rarest]
        system.requests += 1
