"""Every run of the study as one line of JSON, on disk as soon as it is over: what is there is not run again."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.sim.cells import Cell, Ran
from impala_vllm.config import ConfigError
from impala_vllm.sim.measures import Measures


class Raw:
    """The first line says what all runs have in common; a file of something else is refused."""

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        """Go on with the file, or begin it. None: keep nothing. Raises ConfigError with one line."""
        self.found: dict[Cell, Ran] = {}
        self._path = path
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size:
                self._read(path, about)
            else:
                path.write_text(json.dumps({"about": about}) + "\n", encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"{path}: cannot keep runs there ({e.strerror}); give --raw another file") from e

    def add(self, ran: Ran) -> None:
        """Keep it, on disk before this returns."""
        self.found[ran.cell] = ran
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(asdict(ran)) + "\n")

    def _read(self, path: Path, about: Mapping[str, Any]) -> None:
        whole, _, torn = path.read_text(encoding="utf-8").rpartition("\n")
        if torn:  # a run that ended while it wrote
            path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        try:
            first, *lines = (json.loads(line) for line in whole.splitlines())
            begun = first["about"]
            for line in lines:
                cell, measures = Cell(**line.pop("cell")), Measures(**line.pop("measures"))
                self.found[cell] = Ran(cell, measures=measures, **line)
        except (ValueError, TypeError, KeyError) as e:
            raise ConfigError(f"{path}: no file of the study's runs ({e}); give --raw another file") from e
        odd = [key for key in {**begun, **about} if begun.get(key) != about.get(key)]
        if odd:
            said = ", ".join(f"{key} {begun.get(key)} and not {about.get(key)}" for key in odd)
            raise ConfigError(f"{path}: begun with {said}; go on with the same, or give --raw another file")
