"""The one configuration: frozen, nested, units in names, a reason beside every fixed number.

Values come from defaults, then one YAML file, then flags; `Settings.origins` remembers which.
Everything not listed here is estimated from live state.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

import yaml

from impala_vllm.core.admission import AdmissionConfig
from impala_vllm.core.cost import CostConfig
from impala_vllm.core.gaps import GapConfig
from impala_vllm.core.identity.config import IdentityConfig
from impala_vllm.core.planner import PlannerConfig
from impala_vllm.core.rank import RankConfig
from impala_vllm.core.retention import RetentionConfig


class ConfigError(ValueError):
    """Bad configuration, in one line: what, where, and what to do."""


class Mode(Enum):
    OFF = "off"
    """Stock vLLM: no identity, no policy."""
    OBSERVE = "observe"
    """Recognise traces and measure; decide nothing."""
    ENFORCE = "enforce"
    """Let policy decide."""


@dataclass(frozen=True, slots=True)
class MetadataConfig:
    """Where requests say who they are."""

    session_headers: tuple[str, ...] = ()
    """Further headers that carry a trace id, before the known ones."""
    tenant_header: str | None = None
    """Header set by a gateway you trust; None: the tenant is the API key's digest."""
    prompt_cache_key_is_session: bool = False
    """Take `prompt_cache_key` for a trace id. Many clients send one a user or one an application."""


@dataclass(frozen=True, slots=True)
class HealthConfig:
    """When a server counts as stalled."""

    stalled_after_s: float = 60.0
    """No token computed for this long while requests wait. A long prefill step takes seconds."""
    answer_within_s: float = 2.0
    """How long /impala/* waits for the engine before it answers without it."""


class KvFormat(Enum):
    EXACT = "exact"
    """KV as the model has it."""
    FP8 = "fp8"
    """Half the bytes, at a loss: answers may differ from stock vLLM's."""


class Swap(Enum):
    IMPALA = "impala"
    """Our kernels and the GPU's DMA engines; vLLM's own where these cannot be had."""
    VLLM = "vllm"
    """vLLM's own worker."""


@dataclass(frozen=True, slots=True)
class TiersConfig:
    """Room below HBM."""

    host_gib: float | None = None
    """Host DRAM for KV, all ranks of this machine together; 0: HBM only. None: a share of what is free, where KV lives
    on a device."""
    nvme_path: str | None = None
    """Directory of the KV slab on NVMe; None: no such tier."""
    nvme_gib: float = 0.0
    """Size of what lies there, all ranks of this machine together; needs `nvme_path`."""
    host_bytes_per_s: float | None = None
    """Most that either direction between HBM and host may move, all ranks of this machine together; None: what the link
    gives."""
    nvme_read_bytes_per_s: float | None = None
    """Most that is read from NVMe, all ranks of this machine together."""
    nvme_write_bytes_per_s: float | None = None
    """Most that is written to NVMe, all ranks of this machine together: endurance is a budget too."""
    kv_format: KvFormat = KvFormat.EXACT
    """What tiers keep: exact, or fp8 in half the room, at a loss."""
    swap: Swap = Swap.IMPALA
    """Who copies between HBM and host on a GPU: impala or vllm."""


@dataclass(frozen=True, slots=True)
class LedgerConfig:
    """What each trace took, written beside the server."""

    path: str | None = None
    """JSONL file, one record a finished trace; None: no ledger. Data-parallel ranks above 0 have files of their own,
    NAME.rankN.SUFFIX."""
    max_mib: float = 100.0
    """Size at which the file is rotated: a day of 100,000 traces."""
    keep: int = 7
    """Rotated files that stay, the oldest goes first."""
    otlp_endpoint: str | None = None
    """Collector that gets a span a finished trace, OTLP over HTTP: `http://HOST:4318/v1/traces`; None: no spans."""


@dataclass(frozen=True, slots=True)
class Config:
    """All of it. `load()` builds one; every field works untuned."""

    mode: Mode = Mode.ENFORCE
    """What impala may do: off, observe or enforce."""
    identity: IdentityConfig = field(default_factory=IdentityConfig)
    gaps: GapConfig = field(default_factory=GapConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    metadata: MetadataConfig = field(default_factory=MetadataConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    tiers: TiersConfig = field(default_factory=TiersConfig)
    registry: str | None = None
    """Fleet registry to announce this server to."""
    ledger: LedgerConfig = field(default_factory=LedgerConfig)


@dataclass(frozen=True, slots=True)
class Settings:
    """A configuration and where each value that is not a default came from."""

    config: Config
    origins: Mapping[str, str]
    """Dotted name -> "FILE" or "--flag"."""

    def describe(self) -> list[str]:
        """One `name = value (origin)` a line, every field, in order."""
        return [f"{n} = {_show(v)} ({self.origins.get(n, 'default')})" for n, v in flatten(self.config)]


def load(path: str | Path | None = None, flags: Mapping[str, tuple[str, Any]] | None = None) -> Settings:
    """Merge defaults, the YAML file and flags.

    `flags` maps a dotted name to (the flag as typed, value). Raises ConfigError with one line.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        for name, value in _leaves(_read_yaml(Path(path)), Config, "", str(path)):
            values[name], origins[name] = value, str(path)
    for name, (flag, value) in (flags or {}).items():
        values[name], origins[name] = value, flag
    config = _build(Config, "", values, origins)
    _check(config, origins)
    return Settings(config, origins)


def dump(settings: Settings) -> dict[str, Any]:
    """Plain data for another process; `restore` reads it back."""
    return {
        "values": {n: (v.value if isinstance(v, Enum) else v) for n, v in flatten(settings.config)},
        "origins": dict(settings.origins),
    }


def restore(data: Mapping[str, Any]) -> Settings:
    """The inverse of `dump`."""
    origins = dict(data["origins"])
    return Settings(_build(Config, "", dict(data["values"]), origins), origins)


def flatten(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted name and value of every leaf, in declaration order."""
    leaves: list[tuple[str, Any]] = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            leaves += flatten(value, f"{prefix}{f.name}.")
        else:
            leaves.append((prefix + f.name, value))
    return leaves


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{path}: cannot read it ({e.strerror}); give --impala-config an existing YAML file") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8 text; give --impala-config a YAML file") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # a day that is none is a plain ValueError
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = " ".join(str(getattr(e, "problem", None) or e).split())
        raise ConfigError(f"{where}: not valid YAML ({problem}); mend that line") from e
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the top level is a {type(data).__name__}; write `key: value` lines")
    return cast("dict[str, Any]", data)


def _leaves(data: Mapping[Any, Any], cls: type, prefix: str, where: str) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    found: list[tuple[str, Any]] = []
    for key, value in data.items():
        name = f"{prefix}{key}"
        if key not in hints:
            close = difflib.get_close_matches(str(key), list(hints), n=1)
            hint = f"did you mean {prefix}{close[0]!s}?" if close else f"known here: {', '.join(hints)}"
            raise ConfigError(f"{where}: unknown key {name}; {hint}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: {name} holds several keys; write them indented below it")
            found += _leaves(cast("dict[Any, Any]", value), cast("type", hints[key]), name + ".", where)
        else:
            found.append((name, value))
    return found


def _build(cls: type, prefix: str, values: Mapping[str, Any], origins: Mapping[str, str]) -> Any:
    kwargs: dict[str, Any] = {}
    for key, hint in typing.get_type_hints(cls).items():
        name = prefix + key
        if dataclasses.is_dataclass(hint):
            kwargs[key] = _build(cast("type", hint), name + ".", values, origins)
        elif name in values:
            kwargs[key] = _convert(name, hint, values[name], origins.get(name, "default"))
    return cls(**kwargs)


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE]\d+")
"""What YAML 1.1 reads as text: it wants `1.0e+9`, everybody writes `1e9`."""


def _convert(name: str, hint: Any, value: Any, origin: str) -> Any:
    args = typing.get_args(hint)
    if value is None and type(None) in args:
        return None
    if isinstance(hint, types.UnionType):
        hint = next(a for a in args if a is not type(None))
    if isinstance(hint, type) and issubclass(hint, Enum):
        if isinstance(value, bool):  # YAML 1.1 reads a bare `off` as false
            value = {False: "off"}.get(value, value)
        try:
            return hint(value)
        except ValueError:
            allowed = ", ".join(str(m.value) for m in hint)
            raise ConfigError(f"{origin}: {name} cannot be {value!r}; choose one of {allowed}") from None
    if typing.get_origin(hint) is tuple:
        items = cast("list[Any]", value) if isinstance(value, list | tuple) else None
        if items is not None and all(isinstance(v, str) for v in items):
            return tuple(items)
        raise ConfigError(f"{origin}: {name} must be a list of texts, not {value!r}")
    if hint is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str) and isinstance(value, hint) and not isinstance(value, bool):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, str(hint))
    raise ConfigError(f"{origin}: {name} must be {kind}, not {value!r}")


_POSITIVE = (
    "identity.max_traces",
    "identity.max_blocks",
    "identity.lease_s",
    "identity.subagent_window_s",
    "identity.compaction_window_s",
    "rank.hold_s",
    "admission.patience",
    "health.stalled_after_s",
    "health.answer_within_s",
    "ledger.max_mib",
)


def _check(config: Config, origins: Mapping[str, str]) -> None:
    values = dict(flatten(config))
    for name in _POSITIVE:
        if not 0 < values[name] < float("inf"):
            raise ConfigError(f"{origins.get(name, 'default')}: {name} must be above 0, not {values[name]!r}")
    for name in ("tiers.host_gib", "tiers.nvme_gib"):
        if values[name] is not None and not 0 <= values[name] < float("inf"):
            raise ConfigError(f"{origins.get(name, 'default')}: {name} must be 0 or more, not {values[name]!r}")
    if config.tiers.nvme_gib > 0 and config.tiers.nvme_path is None:
        where = origins.get("tiers.nvme_gib", "default")
        raise ConfigError(f"{where}: tiers.nvme_gib has no directory; add --impala-nvme-path DIR")
    if config.tiers.nvme_path is not None and config.tiers.nvme_gib == 0:
        where = origins.get("tiers.nvme_path", "default")
        raise ConfigError(f"{where}: tiers.nvme_path has no size; add --impala-nvme-gib G")
    if config.tiers.nvme_path is not None and config.tiers.host_gib == 0:
        where = origins.get("tiers.host_gib", "default")
        raise ConfigError(f"{where}: tiers.host_gib 0 leaves NVMe nothing to be read into; give it 1 or more")
    if config.ledger.keep < 0:
        where = origins.get("ledger.keep", "default")
        raise ConfigError(f"{where}: ledger.keep must be 0 or more, not {config.ledger.keep!r}")
    if config.ledger.otlp_endpoint is not None and config.ledger.path is None:
        where = origins.get("ledger.otlp_endpoint", "default")
        raise ConfigError(f"{where}: ledger.otlp_endpoint has no ledger; add --impala-ledger FILE")
    for name in ("tiers.host_bytes_per_s", "tiers.nvme_read_bytes_per_s", "tiers.nvme_write_bytes_per_s"):
        if values[name] is not None and not 0 < values[name] < float("inf"):
            raise ConfigError(f"{origins.get(name, 'default')}: {name} must be above 0, not {values[name]!r}")


def _show(value: Any) -> str:
    return str(value.value) if isinstance(value, Enum) else repr(value)
