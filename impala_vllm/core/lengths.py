"""How many tokens will this turn generate? A running mean of the trace, shrunk to the population's."""

from dataclasses import dataclass

from impala_vllm.core.types import TraceId


@dataclass(frozen=True, slots=True)
class LengthConfig:
    """Priors of the output-length estimate."""

    prior_tokens: float = 200.0
    """Median output of a coding agent's turn (recorded sessions); replaced after a few turns."""
    shrink_turns: float = 3.0
    """Turns the population counts for against a trace's own."""
    memory_turns: float = 200.0


class OutputLengths:
    """Running means. O(1) each way; `forget` when the trace leaves the table."""

    def __init__(self, config: LengthConfig | None = None) -> None:
        self.config = config or LengthConfig()
        self._mean = self.config.prior_tokens
        self._num_seen = 0
        self._traces: dict[TraceId, tuple[int, float]] = {}

    def observe(self, trace_id: TraceId | None, output_tokens: int) -> None:
        """A turn generated `output_tokens`."""
        self._num_seen += 1
        self._mean += (output_tokens - self._mean) / min(self._num_seen, self.config.memory_turns)
        if trace_id is not None:
            turns, total = self._traces.get(trace_id, (0, 0.0))
            self._traces[trace_id] = (turns + 1, total + output_tokens)

    def expect(self, trace_id: TraceId | None, limit: int | None = None) -> float:
        """Expected output tokens of the trace's next turn, at most `limit`."""
        turns, total = self._traces.get(trace_id, (0, 0.0)) if trace_id is not None else (0, 0.0)
        shrink = self.config.shrink_turns
        expected = (total + shrink * self._mean) / (turns + shrink)
        return expected if limit is None else min(expected, limit)

    def forget(self, trace_id: TraceId) -> None:
        self._traces.pop(trace_id, None)
