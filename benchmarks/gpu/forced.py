"""Makes an engine emit recorded outputs under vLLM's model runner V2, as `ForcedReplay` does under V1.

vLLM's own trace replay ends every turn as if it had run out of tokens; here a turn stops at its own end token, which is
what a scheduler of traces looks at. A request asks by `extra_args={"forced_output": [ids...]}`.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

FORCED_OUTPUT = "forced_output"
MOST_TOKENS = 1024
"""Longest output that can be forced."""
LOUD = 1e9
"""Above any logit a model gives."""


class Forced(LogitsProcessor):
    """Costs one small gather and one scatter a step, and never waits for the device."""

    def __init__(self, vllm_config: "VllmConfig", req_states: LogitsProcRequestState) -> None:
        self._state = req_states
        slots, device = req_states.max_num_reqs, req_states.device
        self._tokens = torch.zeros(slots, MOST_TOKENS, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self._new: dict[int, list[int]] = {}

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        forced = (sampling_params.extra_args or {}).get(FORCED_OUTPUT)
        if forced is not None and len(forced) > MOST_TOKENS:
            raise ValueError(f"{FORCED_OUTPUT} has {len(forced)} tokens, at most {MOST_TOKENS} can be forced")

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        forced: Any = (sampling_params.extra_args or {}).get(FORCED_OUTPUT)
        self._new[req_idx] = list(forced or ())
        return forced is not None

    def apply_staged_writes(self) -> None:
        for slot, tokens in self._new.items():
            self._tokens[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            self._lengths[slot] = len(tokens)
        self._new.clear()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        slots = ctx.expanded_idx_mapping.long()
        # The row's input lies at `pos`, so what is sampled is the token after it.
        step = ctx.pos.long() + 1 - self._state.prompt_len.gpu[slots].long()
        is_forced = (step >= 0) & (step < self._lengths[slots])
        token = self._tokens[slots, step.clamp(0, MOST_TOKENS - 1)].unsqueeze(1)
        loud = torch.where(is_forced.unsqueeze(1), LOUD, logits.gather(1, token))
        return logits.scatter_(1, token, loud)
