"""Writes docs/configuration.md from the configuration's own dataclasses: `python -m tools.config_docs`.

Each field's text is the docstring below it, so the page cannot say anything the code does not.
"""

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

from impala_vllm.config import Config, flatten

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

Written by `python -m tools.config_docs` from the code; do not edit.

Every field has a default that works untuned. Values come from the defaults, then one YAML file
(`--impala-config FILE`, or the `IMPALA_CONFIG` variable for `LLM(...)`), then flags. An unknown key is an error that
names the nearest known one. The server prints all of them once at start, each with where it came from.

```yaml
mode: enforce
identity:
  max_traces: 4096
```
"""


def page() -> str:
    """The whole text."""
    return HEAD + "".join(_section(cls, prefix) for prefix, cls in _sections(Config, ""))


def main() -> int:
    """Write the page; with --check only compare, and fail where it is stale."""
    if "--check" in sys.argv[1:]:
        return 0 if PAGE.read_text(encoding="utf-8") == page() else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


def _sections(cls: type, prefix: str) -> list[tuple[str, type]]:
    found = [(prefix, cls)]
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found += _sections(typing.cast("type", hint), f"{prefix}{name}.")
    return found


def _section(cls: type, prefix: str) -> str:
    defaults = dict(flatten(cls()))
    notes = _field_docs(cls)
    title = f"## `{prefix.rstrip('.')}`\n{inspect.getdoc(cls)}\n" if prefix else ""
    rows = [
        f"| `{prefix}{name}` | `{_text(defaults[name])}` | {' '.join(notes.get(name, '').split())} |\n"
        for name in (f.name for f in dataclasses.fields(cls))
        if name in defaults
    ]
    return f"\n{title}\n| key | default | meaning |\n|---|---|---|\n{''.join(rows)}"


def _field_docs(cls: type) -> dict[str, str]:
    body = typing.cast("ast.ClassDef", ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    return {
        field.target.id: note.value.value
        for field, note in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(note, ast.Expr)
        and isinstance(note.value, ast.Constant)
        and isinstance(note.value.value, str)
    }


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "value", list(value) if isinstance(value, tuple) else value))


if __name__ == "__main__":
    sys.exit(main())
