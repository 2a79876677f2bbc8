"""Models of real shape and random weights: a config.json, and the tokenizer files of the tiny model."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from impala_vllm.replay import tiny_model
from impala_vllm.replay.vocabulary import Vocabulary

MAX_TOKENS = 40_960


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen3. `prefill_tokens_per_s` is a guess until a run has measured it."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int
    vocabulary: int
    is_tied: bool
    prefill_tokens_per_s: float

    @property
    def kv_bytes_per_token(self) -> int:
        """In bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        embeddings = self.vocabulary * self.hidden * (1 if self.is_tied else 2)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + embeddings


SHAPES = {
    s.name: s
    for s in (
        # Qwen3-1.7B and Qwen3-8B, by their published configurations.
        Shape("1b", 2048, 28, 16, 8, 6144, 128, 151_936, True, 60_000.0),
        Shape("8b", 4096, 36, 32, 8, 12_288, 128, 151_936, False, 18_000.0),
        # For rehearsals on a CPU.
        Shape("small", 128, 2, 2, 1, 320, 64, 4096, False, 8_000.0),
    )
}


def write(shape: Shape, directory: Path) -> Path:
    """A model directory for `load_format="dummy"`. Raises TinyModelError without transformers or tokenizers."""
    target = directory / f"qwen3-{shape.name}"
    if target.exists():
        return target
    tiny = tiny_model.build("1m", cache_dir=directory / "cache")
    draft = directory / f".draft-{shape.name}"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(tiny, draft, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    config |= {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": MAX_TOKENS,
        "tie_word_embeddings": shape.is_tied,
    }
    for per_layer in ("layer_types", "max_window_layers"):
        config.pop(per_layer, None)
    (draft / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    draft.rename(target)
    return target


def vocabulary(model: Path) -> Vocabulary:
    """Of the tokenizer, which is smaller than the model's vocabulary."""
    return Vocabulary.of_model(model)
