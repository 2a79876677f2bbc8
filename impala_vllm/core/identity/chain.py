"""One conversation of a trace: the prompt that last extended it, and where its blocks end."""

from impala_vllm.core.identity.index import Tip
from impala_vllm.core.traces import Trace
from impala_vllm.core.types import RequestId


class Chain:
    """A line of prompts each of which extends the one before. Written by `core.identity` alone."""

    __slots__ = (
        "ending",
        "era",
        "last_s",
        "opening",
        "prompt_depth",
        "prompt_tokens",
        "request_id",
        "running",
        "tip",
        "tokens",
        "trace",
    )

    def __init__(self, trace: Trace, opening: int, era: int = 0) -> None:
        self.trace = trace
        self.era = era
        """How often the history had been rewritten when it began, as far as identity believes."""
        self.tip: Tip[Chain] = Tip(self)
        self.opening = opening
        """Blocks of its first prompt: whoever shares less may merely share an opening."""
        self.prompt_depth = opening
        """Blocks of its last prompt."""
        self.prompt_tokens = self.ending = 0
        """Length of its last prompt, and the digest of its last tokens."""
        self.tokens = 0
        """Tokens of its last prompt, and of the output once finished."""
        self.request_id: RequestId | None = None
        self.running = False
        self.last_s = trace.last_event_s
