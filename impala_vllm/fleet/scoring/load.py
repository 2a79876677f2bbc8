"""What a replica has to do already: sent there and not ended, by this router and by others that say so."""

from typing import NamedTuple


class Elsewhere(NamedTuple):
    """What other routers have sent to a replica."""

    num_running: int = 0
    pending_s: float = 0.0
    live_tokens: int = 0
    num_traces: int = 0


class Load:
    """One replica's. Written by the router as requests start and end; read by the policy."""

    __slots__ = ("capacity_tokens", "elsewhere", "is_open", "live_tokens", "num_running", "num_traces", "pending_s")

    def __init__(self, capacity_tokens: int | None = None) -> None:
        self.capacity_tokens = capacity_tokens
        """Room for KV in HBM; None: unknown."""
        self.live_tokens = 0
        """Of the traces whose KV is there and that may come back."""
        self.num_traces = 0
        """How many those are, in tool gaps too."""
        self.num_running = 0
        """Requests sent there that have not ended."""
        self.pending_s = 0.0
        """Prefill of those that have not answered yet."""
        self.is_open = True
        """Whether new requests may go there: it is up, and not being drained."""
        self.elsewhere = Elsewhere()

    def start(self, prefill_s: float) -> None:
        """A request goes there."""
        self.num_running += 1
        self.pending_s += prefill_s

    def answer(self, prefill_s: float) -> None:
        """Its first token has come, or never will."""
        # Sums of floats that went in come out again, but not to the last bit.
        self.pending_s = max(0.0, self.pending_s - prefill_s)

    def end(self) -> None:
        """It has ended."""
        self.num_running -= 1
        if not self.num_running:
            self.pending_s = 0.0
