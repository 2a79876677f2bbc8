"""Benchmarks only: makes the engine emit a recorded output token by token.

Loaded with `--logits-processors impala_vllm.adapters.vllm.forced_replay:ForcedReplay`; a request asks
for it with `vllm_xargs={"forced_output": [ids...]}` and `max_tokens` of the same length. The model
still runs every step, so the KV behind the output is real; requests without the argument are untouched.
Refused by vLLM together with speculative decoding, as any custom logits processor.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

FORCED_OUTPUT = "forced_output"


class ForcedReplay(LogitsProcessor):
    """Leaves one token possible in each forced row. Costs one small scatter a step."""

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        # Row -> what to emit and the engine's own running output. Async scheduling appends
        # placeholders to that list, so its length is right even where its content is not yet.
        self._rows: dict[int, tuple[Sequence[int], Sequence[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        forced = (sampling_params.extra_args or {}).get(FORCED_OUTPUT)
        if forced is None:
            return
        if not isinstance(forced, list) or not all(isinstance(i, int) and i >= 0 for i in forced):  # pyright: ignore
            raise ValueError(f"vllm_xargs.{FORCED_OUTPUT} must be a list of token ids")
        if sampling_params.max_tokens is None or sampling_params.max_tokens > len(forced):
            raise ValueError(f"vllm_xargs.{FORCED_OUTPUT} has {len(forced)} tokens; set max_tokens to at most that")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _forced)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        rows: list[int] = []
        tokens: list[int] = []
        for row, (forced, emitted) in self._rows.items():
            # Async scheduling may run one step past the end; its token is thrown away.
            if len(emitted) < len(forced):
                rows.append(row)
                tokens.append(forced[len(emitted)])
        if rows:
            logits[rows] = float("-inf")
            logits[rows, tokens] = 0.0
        return logits


def _forced(params: "SamplingParams", _: Any, emitted: list[int]) -> tuple[Sequence[int], Sequence[int]] | None:
    forced = (params.extra_args or {}).get(FORCED_OUTPUT)
    return None if forced is None else (forced, emitted)
