"""What import-linter cannot say in general: core imports nothing outside the standard library."""

import ast
import sys
from pathlib import Path

import impala_vllm

CORE = Path(impala_vllm.__file__).parent / "core"


def test_core_imports_only_itself_and_the_standard_library():
    foreign: list[str] = []
    for path in CORE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            allowed = [n.startswith("impala_vllm.core") or n.split(".")[0] in sys.stdlib_module_names for n in names]
            foreign += [f"{path.name}: {name}" for name, ok in zip(names, allowed, strict=True) if not ok]
    assert foreign == []
