"""Which layer of a real engine breaks: one arm in one mode, a prompt answered fresh, from HBM and from below it."""

import os
import time
from typing import Any

from benchmarks.gpu import device
from benchmarks.gpu.engine import GIB, Mode, Setting, start
from benchmarks.gpu.out import Out
from impala_vllm.replay import tiny_model
from impala_vllm.replay.vocabulary import Vocabulary

PROMPT_TOKENS = 640
ANSWER_TOKENS = 8


def run(out: Out, runner: str, graphs: str, arm: str = "stock") -> None:
    """Notes in which mode the stock engine has run, for the sessions to come.

    Raises AssertionError where the same prompt gets another answer, or a tier gives nothing back.
    """
    model = tiny_model.build("1m" if device.is_rehearsal() else "26m")
    mode = Mode("v1", False) if device.is_rehearsal() else _mode(runner, graphs == "yes")
    block_size = 32 if device.is_rehearsal() else 16
    setting = Setting(
        model,
        # Room for one prompt and its answer beside another; three others push it out.
        num_blocks=2 * (PROMPT_TOKENS // block_size + 4),
        max_model_len=PROMPT_TOKENS + 64,
        host_bytes=GIB // 4,
        mode=mode,
        max_num_seqs=4,
        block_size=block_size,
        always_loads=True,
    )
    began = time.monotonic()
    llm = start(arm, setting)
    out.line(f"{arm}, {mode.describe()}: up after {time.monotonic() - began:.0f} s")
    words = Vocabulary.of_model(model)
    prompt = words.text("the prompt", PROMPT_TOKENS)
    answers = [_answer(llm, prompt), _answer(llm, prompt)]
    for i in range(3):
        _answer(llm, words.text(f"another {i}", PROMPT_TOKENS))
    answers.append(_answer(llm, prompt))
    cached = [found for _, found in answers]
    out.line(f"answers {answers[0][0]}; cached tokens fresh, in HBM and pushed out of it: {cached}")
    assert all(tokens == answers[0][0] for tokens, _ in answers), f"answers differ: {[a for a, _ in answers]}"
    assert cached[1] > 0, "the prefix cache found nothing"
    if arm != "stock":
        assert cached[2] > 0, "nothing came back from host memory"
    if arm == "stock":
        out.note(mode=[mode.runner, mode.has_graphs, mode.attention])


def _mode(runner: str, has_graphs: bool) -> Mode:
    """Without graphs, with the attention that needs nothing compiled: the way with the fewest layers."""
    return Mode(runner, has_graphs, None if has_graphs else "TRITON_ATTN")


def _answer(llm: Any, prompt: tuple[int, ...]) -> tuple[list[int], int]:
    """Greedy tokens, and how many of the prompt's were cached."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids), output.num_cached_tokens or 0


def known_mode(out: Out) -> Mode:
    """The mode in which a stock engine last ran here; the usual one where none has been tried."""
    if device.is_rehearsal():
        return Mode("v1", False)
    runner, has_graphs, attention = out.facts().get("mode", ["v2", True, None])
    return Mode(runner, has_graphs, attention)


def host_bytes() -> int:
    """Most pinned host memory that an engine may take, as asked and as /dev/shm allows."""
    asked = float(os.environ.get("IMPALA_GPU_HOST_GIB") or 8.0) * GIB
    return int(min(asked, 0.8 * device.shm_bytes()))
