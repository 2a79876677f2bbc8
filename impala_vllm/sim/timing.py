"""How long a step takes: fixed + each prompt token by its depth + each decoding request by its context.

Files in `timings/`, one an engine: where its figures come from stands in each.
"""

from collections.abc import Iterable
from enum import Enum
from importlib import resources
from pathlib import Path

import msgspec
import yaml

from impala_vllm.config import ConfigError

DEFAULT = "h100-llama-3.1-8b"


class Source(Enum):
    """What the figures rest on."""

    FITTED = "fitted"
    """Measured by this project, by the record named."""
    PUBLISHED = "published"
    """What others measured, by the source named."""
    DERIVED = "derived"
    """Computed from the data sheet."""


class Timing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine: a model on a machine."""

    name: str
    engine: str
    """Model, precision, machine."""
    source: Source
    provenance: str
    fixed_s: float
    """A step, whatever is in it."""
    prefill_s_per_token: float
    prefill_s_per_token_and_context: float
    """For each token before it."""
    decode_s_per_request: float
    decode_s_per_context: float
    """For each token of a decoding request's context."""
    kv_bytes_per_token: int
    hbm_tokens: int
    """Room for KV."""
    host_bytes_per_s: float | None = None
    """Between host and HBM, each way; None: infinitely fast."""
    nvme_read_bytes_per_s: float | None = None
    nvme_write_bytes_per_s: float | None = None
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 128
    max_context_tokens: int | None = None
    """What the model takes; None: not said."""

    def prefill_s(self, num_tokens: int, before: int) -> float:
        """A chunk of a prompt with `before` tokens in front of it."""
        return num_tokens * (
            self.prefill_s_per_token + self.prefill_s_per_token_and_context * (before + 0.5 * num_tokens)
        )

    def step_s(self, prompts: Iterable[tuple[int, int]], num_decoding: int, context: int) -> float:
        """`prompts`: (tokens, tokens before them) of each prefill; `context`: tokens of all that decode."""
        deep = sum(self.prefill_s(n, before) for n, before in prompts)
        return self.fixed_s + deep + num_decoding * self.decode_s_per_request + context * self.decode_s_per_context

    def describe(self) -> str:
        """One line for a report."""
        return f"{self.name} ({self.engine}); {self.source.value}: {' '.join(self.provenance.split())}"


def names() -> list[str]:
    """Of the timings that are shipped."""
    folder = resources.files("impala_vllm.sim").joinpath("timings")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load(name: str) -> Timing:
    """A shipped timing by its name, or a YAML file. Raises ConfigError with one line."""
    if name in names():
        return _parse(resources.files("impala_vllm.sim").joinpath("timings", f"{name}.yaml").read_text("utf-8"), name)
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"{name}: no timing file ({getattr(e, 'strerror', None) or 'not text'}); give a YAML file or one of "
            f"{', '.join(names())}"
        ) from e
    return _parse(text, name)


def _parse(text: str, where: str) -> Timing:
    try:
        timing = msgspec.convert(yaml.safe_load(text), Timing)
    except (yaml.YAMLError, msgspec.ValidationError, ValueError, RecursionError) as e:
        raise ConfigError(f"{where}: not a timing ({' '.join(str(e).split())}); mend that line") from e
    for field in timing.__struct_fields__:
        value = getattr(timing, field)
        if isinstance(value, int | float) and not 0 <= value < float("inf"):
            raise ConfigError(f"{where}: {field} must be 0 or more, not {value!r}")
    links = ("host_bytes_per_s", "nvme_read_bytes_per_s", "nvme_write_bytes_per_s")
    counts = ("hbm_tokens", "max_num_batched_tokens", "max_num_seqs", "max_context_tokens")
    for field in (*links, *counts, "fixed_s", "prefill_s_per_token"):
        if getattr(timing, field) == 0:
            raise ConfigError(f"{where}: {field} must be above 0")
    return timing
