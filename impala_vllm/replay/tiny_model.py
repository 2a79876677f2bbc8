"""A small Qwen3 with random weights and a real tokenizer, built on the spot and kept in a cache.

What a server needs to be a server: chat template, tool calls, end of turn. Its words mean nothing,
but they depend on the whole prompt, so that a wrong KV block shows as a different answer.
Same recipe, same files: they are named by a digest of everything that goes into them.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

METHOD = 2
"""Raised when the code below makes other files from the same inputs: part of the recipe."""

VOCABULARY_SIZE = 4096
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TOOL_CALL_START, TOOL_CALL_END = "<tool_call>", "</tool_call>"


class TinyModelError(RuntimeError):
    """The model cannot be built here, in one line."""


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a Qwen3; the vocabulary is the same for all."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 64


SIZES = {
    "1m": Size(hidden=128, layers=2, heads=2, kv_heads=1, intermediate=320),
    "5m": Size(hidden=256, layers=4, heads=4, kv_heads=2, intermediate=768),
    "8m": Size(hidden=256, layers=8, heads=4, kv_heads=2, intermediate=768),
    "26m": Size(hidden=512, layers=8, heads=8, kv_heads=2, intermediate=1344),
}
"""Named by parameters, embeddings included."""

MAX_TOKENS = 131_072
"""Longest prompt and output together: whole recorded sessions fit unscaled."""

CPU_DTYPE = "float32"
"""What to serve it with on a CPU (`--dtype`). The files are bfloat16: `auto` is right on a GPU, but CPUs without
bfloat16 instructions emulate it, and greedy outputs then depend on how requests were batched."""

ATTENTION_SHARPNESS = 3.0
"""Scale of the queries. At 1, random attention averages its context away and an answer hardly depends on it;
at 3, another block anywhere in a 600-token prompt changes the first answered token."""


def build(size: str = "26m", seed: int = 0, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The directory of the model, made on the first call. Builders may race: one result, complete or absent.

    Raises TinyModelError for an unknown size or where torch, transformers or tokenizers is missing.
    """
    if size not in SIZES:
        raise TinyModelError(f"no tiny model of size {size!r}; choose one of {', '.join(SIZES)}")
    recipe = _recipe(size, seed)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    directory = Path(cache_dir or default_cache_dir()) / "models" / f"tiny-{size}-{digest}"
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            _write(draft, SIZES[size], seed)
            _publish(draft, directory)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return directory


def default_cache_dir() -> Path:
    """IMPALA_CACHE_DIR, else `impala-vllm` in the user's cache directory."""
    own = os.environ.get("IMPALA_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "impala-vllm"


def _recipe(size: str, seed: int) -> dict[str, Any]:
    """All that decides the bytes of the result."""
    try:
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    except metadata.PackageNotFoundError as e:
        raise TinyModelError(f"building a model needs {e.name}; pip install 'impala-vllm[cpu]' brings it") from e
    return {
        "method": METHOD,
        "shape": asdict(SIZES[size]),
        "max_tokens": MAX_TOKENS,
        "seed": seed,
        "versions": versions,
        "text": hashlib.sha256(_data("tokenizer_text.txt").encode()).hexdigest(),
        "template": hashlib.sha256(_data("chat_template.jinja").encode()).hexdigest(),
    }


def _publish(draft: Path, directory: Path) -> None:
    draft.chmod(0o755)
    try:
        draft.rename(directory)
    except OSError:
        if not directory.exists():  # else another builder was faster, with the same bytes
            raise


def _write(directory: Path, size: Size, seed: int) -> None:
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = _tokenizer()
    tokenizer.save_pretrained(directory)
    eos, pad = tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT])
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("q_norm.weight"):
                weight.fill_(ATTENTION_SHARPNESS)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    with _no_progress_bar():
        model.bfloat16().save_pretrained(directory)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Writing takes a fraction of a second; the bar would outlive it on the caller's terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenizer() -> Any:
    """Byte-level BPE over the bundled text, filled to the vocabulary size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    control = [AddedToken(text, special=True) for text in (END_OF_TEXT, TURN_START, TURN_END)]
    # Not special, so that they stay in the text where a server parses tool calls.
    marks = [AddedToken(text, special=False) for text in (TOOL_CALL_START, TOOL_CALL_END)]
    backend = Tokenizer(models.BPE())
    # A newline is a token of its own: whatever an answer begins with, its first token does not merge with
    # the prompt's last, and the next turn's prompt begins with exactly the tokens of this one.
    newline = pre_tokenizers.Split("\n", "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([newline, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(control) - len(marks),
        min_frequency=0,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([_data("tokenizer_text.txt")], trainer)
    backend.add_special_tokens(control)
    backend.add_tokens(marks)
    if backend.get_vocab_size() != VOCABULARY_SIZE:
        raise TinyModelError(f"the tokenizer has {backend.get_vocab_size()} tokens, not {VOCABULARY_SIZE}")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=_data("chat_template.jinja"),
    )


def _data(name: str) -> str:
    return resources.files("impala_vllm.replay").joinpath("data", name).read_text(encoding="utf-8")


def main() -> int:
    """Print the directory of the model asked for."""
    parser = argparse.ArgumentParser(prog="python -m impala_vllm.replay.tiny_model", description=main.__doc__)
    parser.add_argument("--size", default="26m", choices=sorted(SIZES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        print(build(args.size, args.seed))
    except TinyModelError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
