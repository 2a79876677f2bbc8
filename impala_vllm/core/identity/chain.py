"""One conversation of a trace: the prompt that last extended it, and where its blocks end."""

from impala_vllm.core.identity.index import Tip
from impala_vllm.core.traces import Trace
from impala_vllm.core.types import RequestId


class Chain:
    """A line of prompts each of which extends the one before. Written by `core.identity` alone."""

    __slots__ = ("first_depth", "last_s", "prompt_depth", "request_id", "running", "tip", "trace")

    def __init__(self, trace: Trace, first_depth: int) -> None:
        self.trace = trace
        self.tip: Tip[Chain] = Tip(self)
        self.first_depth = first_depth
        """Blocks of its first prompt: whoever shares less may merely share an opening."""
        self.prompt_depth = first_depth
        """Blocks of its last prompt."""
        self.request_id: RequestId | None = None
        self.running = False
        self.last_s = trace.last_event_s
