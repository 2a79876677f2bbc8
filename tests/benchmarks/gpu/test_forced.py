"""The forced outputs of model runner V2, on the tensors that it hands over."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

from benchmarks.gpu.forced import MOST_TOKENS, Forced

VOCABULARY = 50


def _state(prompt_len: list[int]) -> SimpleNamespace:
    """Of the runner's buffers, those that are read."""
    gpu = torch.tensor(prompt_len, dtype=torch.int32)
    return SimpleNamespace(
        device=torch.device("cpu"), max_num_reqs=len(prompt_len), prompt_len=SimpleNamespace(gpu=gpu)
    )


def _context(slots: list[int], pos: list[int]) -> LogitsContext:
    rows = torch.tensor(slots, dtype=torch.int32)
    where = torch.tensor(pos, dtype=torch.int64)
    return LogitsContext(rows, rows, np.array(slots), torch.zeros_like(rows), rows, where, np.array(pos) + 1)


def _params(*tokens: int) -> SamplingParams:
    return SamplingParams(extra_args={"forced_output": list(tokens)}) if tokens else SamplingParams()


def test_each_row_gets_the_token_of_its_own_step():
    forced = Forced(None, _state([10, 20, 30]))  # pyright: ignore[reportArgumentType]
    assert isinstance(forced, LogitsProcessor)
    assert forced.add_request(0, _params(7, 8, 9))
    assert forced.add_request(2, _params(4, 5))
    assert not forced.add_request(1, _params())
    forced.apply_staged_writes()
    logits = torch.randn(3, VOCABULARY)
    before = logits.clone()
    # Slot 2 samples its first token, slot 0 its third, slot 1 is on its own.
    found = forced.apply(logits, _context([2, 0, 1], [29, 11, 25]))
    assert found.argmax(dim=1).tolist()[:2] == [4, 9]
    assert torch.equal(found[2], before[2])


def test_before_and_after_the_output_nothing_is_forced():
    forced = Forced(None, _state([10]))  # pyright: ignore[reportArgumentType]
    forced.add_request(0, _params(7, 8))
    forced.apply_staged_writes()
    for pos in (3, 8, 11, 500_000):  # a chunk of the prompt, its last but one token, past the end
        logits = torch.randn(1, VOCABULARY)
        before = logits.clone()
        assert torch.equal(forced.apply(logits, _context([0], [pos])), before)


def test_a_slot_forgets_who_had_it_before():
    forced = Forced(None, _state([10]))  # pyright: ignore[reportArgumentType]
    forced.add_request(0, _params(7, 8))
    forced.apply_staged_writes()
    forced.add_request(0, _params())
    forced.apply_staged_writes()
    logits = torch.randn(1, VOCABULARY)
    before = logits.clone()
    assert torch.equal(forced.apply(logits, _context([0], [9])), before)


def test_an_output_too_long_is_refused_at_admission():
    Forced.validate_params(_params(*range(5)))
    with pytest.raises(ValueError, match="at most"):
        Forced.validate_params(_params(*([1] * (MOST_TOKENS + 1))))
