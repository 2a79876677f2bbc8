"""Which layer of a real engine breaks: one arm in one mode, a prompt answered fresh, from HBM and from below it."""

import os
import time
from typing import Any, NamedTuple

from benchmarks.gpu import device
from benchmarks.gpu.engine import FP8, GIB, Mode, Setting, mover, start
from benchmarks.gpu.out import Out
from impala_vllm.replay import tiny_model
from impala_vllm.replay.vocabulary import Vocabulary

PROMPT_TOKENS = 640
ANSWER_TOKENS = 8
FP8_TOLERANCE = 0.05
"""Of the log probability of the first token that KV from an FP8 tier gave. Seen: 0.001 with the 1 M model on a CPU."""


class Answer(NamedTuple):
    tokens: list[int]
    logprob: float
    """Of the first token."""
    num_cached: int


def run(out: Out, runner: str | None = None, graphs: str | None = None, arm: str = "stock") -> None:
    """Notes in which mode the stock engine has run, for what comes after it; what is not asked for is as there.

    Raises AssertionError where the same prompt gets another answer, or a tier gives nothing back.
    """
    model = tiny_model.build("1m" if device.is_rehearsal() else "26m")
    mode = Mode("v1", False) if device.is_rehearsal() else _mode(known_mode(out), runner, graphs)
    block_size = 32 if device.is_rehearsal() else 16
    setting = Setting(
        model,
        # Room for one prompt and its answer beside another; three others push it out.
        num_blocks=2 * (PROMPT_TOKENS // block_size + 4),
        max_model_len=PROMPT_TOKENS + 64,
        host_bytes=min(GIB // 4, host_bytes()),
        mode=mode,
        max_num_seqs=4,
        block_size=block_size,
        always_loads=True,
    )
    began = time.monotonic()
    llm = start(arm, setting)
    out.line(f"{arm}, {mode.describe()}: up after {time.monotonic() - began:.0f} s, KV moved by {mover()}")
    words = Vocabulary.of_model(model)
    prompt = words.text("the prompt", PROMPT_TOKENS)
    answers = [_answer(llm, prompt), _answer(llm, prompt)]
    for i in range(3):
        _answer(llm, words.text(f"another {i}", PROMPT_TOKENS))
    answers.append(_answer(llm, prompt))
    cached = [answer.num_cached for answer in answers]
    out.line(f"answers {answers[0].tokens}; cached tokens fresh, in HBM and pushed out of it: {cached}")
    if arm == FP8:
        off = abs(answers[2].logprob - answers[0].logprob)
        out.line(f"first token's log probability {answers[0].logprob:.3f}, from FP8 {answers[2].logprob:.3f}")
        assert answers[1].tokens == answers[0].tokens, f"answers differ: {answers[:2]}"
        assert off <= FP8_TOLERANCE, f"the first token's log probability is off by {off:.3f}"
    else:
        assert all(a.tokens == answers[0].tokens for a in answers), f"answers differ: {answers}"
    assert cached[1] > 0, "the prefix cache found nothing"
    if arm != "stock":
        assert cached[2] > 0, "nothing came back from host memory"
    if arm in ("impala", FP8):
        wanted = "PageCopyWorker, as FP8" if arm == FP8 else "PageCopyWorker"
        assert mover() == wanted, f"KV moves by {mover()}, not by our copies; the log says why"
    if arm == "stock":
        out.note(mode=[mode.runner, mode.has_graphs, mode.attention])


def _mode(known: Mode, runner: str | None, graphs: str | None) -> Mode:
    """Without graphs, with the attention that needs nothing compiled: the way with the fewest layers."""
    has_graphs = known.has_graphs if graphs is None else graphs == "yes"
    return Mode(runner or known.runner, has_graphs, None if has_graphs else "TRITON_ATTN")


def _answer(llm: Any, prompt: tuple[int, ...]) -> Answer:
    """Greedy."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=1)
    (output,) = llm.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
    first = output.outputs[0]
    logprob = first.logprobs[0][first.token_ids[0]].logprob
    return Answer(list(first.token_ids), logprob, output.num_cached_tokens or 0)


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
