"""One recorded request: what every log format is translated into."""

from dataclasses import dataclass

from impala_vllm.core.types import Namespace, Outcome


@dataclass(frozen=True, slots=True)
class Turn:
    """A request as a log tells it. `None` where the log does not say."""

    request_id: str
    arrival_s: float
    finish_s: float | None
    blocks: tuple[int, ...]
    """Ids of the prompt's full blocks; equal id means equal block with equal prefix, over the whole log."""
    block_size: int
    """Tokens a block."""
    input_tokens: int
    output_tokens: int | None
    output_blocks: tuple[int, ...] = ()
    """Ids of the blocks after `blocks` that the output filled; the block both share is the first of them."""
    outcome: Outcome = Outcome.UNKNOWN
    tool: str | None = None
    model: str = ""
    tenant: str = ""
    session_id: str | None = None
    """What the client itself sent; identity may use it."""
    recording: str = ""
    """Turns of one recording share a clock; `interleave` moves them together."""
    trace_id: str | None = None
    """Ground truth, for scoring only."""
    parent_trace_id: str | None = None
    """Ground truth, for scoring only."""

    @property
    def namespace(self) -> Namespace:
        """What keeps it apart from others."""
        return Namespace(tenant=self.tenant, model=self.model)
