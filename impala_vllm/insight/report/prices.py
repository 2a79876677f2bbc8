"""A price table: what an hour of each kind of device costs, for ledgers of more than one kind."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import yaml

from impala_vllm.config import ConfigError
from impala_vllm.insight.report.totals import Run

EXAMPLE = "NVIDIA H200: 3.5"


class Prices:
    """Prices by name of device. A name may be a part of what the driver says: the longest that fits counts."""

    def __init__(self, table: dict[str, float], where: str) -> None:
        self._table = {name.casefold(): price for name, price in table.items()}
        self._where = where

    def mean(self, runs: Iterable[Run]) -> float:
        """Of a device hour of these runs together. Raises ConfigError where one has no price."""
        hours = cost = 0.0
        for run in runs:
            device = run.header.device if run.header is not None else ""
            spent = max(0.0, run.end - run.start) * run.gpus
            hours += spent
            cost += spent * self._of(device) if spent else 0.0
        return cost / hours if hours else 0.0

    def _of(self, device: str) -> float:
        fitting = [name for name in self._table if name in device.casefold()]
        if not fitting:
            said = f"no price for {device!r}" if device else "a server in the ledger does not say its device"
            raise ConfigError(f"{self._where}: {said}; add a line like '{EXAMPLE}', or give --price-per-gpu-hour")
        return self._table[max(fitting, key=len)]


def load(path: Path) -> Prices:
    """A YAML file of `name: price` lines. Raises ConfigError with one line."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot read it ({getattr(e, 'strerror', None) or 'not text'})") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: no YAML ({' '.join(str(e).split())}); write lines like '{EXAMPLE}'") from e
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{path}: no price table; write lines like '{EXAMPLE}'")
    table: dict[str, float] = {}
    for name, price in cast("dict[Any, Any]", found).items():
        is_number = isinstance(price, int | float) and not isinstance(price, bool)
        if not isinstance(name, str) or not name.strip() or not is_number or not 0 <= price < math.inf:
            raise ConfigError(f"{path}: {name}: {price!r} is no price of an hour; write lines like '{EXAMPLE}'")
        table[name.strip()] = float(price)
    return Prices(table, str(path))
