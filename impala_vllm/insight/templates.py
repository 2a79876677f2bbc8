"""HTML pages from templates: one style for all of them, whatever comes from a log escaped. Needs jinja2."""

import importlib.util
from typing import Any

from impala_vllm.config import ConfigError

_NEEDED = ("jinja2", "matplotlib")


def check(option: str) -> None:
    """Raise ConfigError, before the work, where a page and its pictures cannot be made; `option` asks for one."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{option} needs {' and '.join(missing)}; pip install 'impala-vllm[bench]', or leave it out")


def render(package: str, context: dict[str, Any]) -> str:
    """`data/report.html.j2` of a package, filled in; what it does not find in `context` is an error."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "data"), PackageLoader("impala_vllm.insight", "data")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(context)
