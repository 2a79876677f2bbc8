"""docs/configuration.md says what the code says."""

from impala_vllm.config import Config, flatten
from tools import config_docs


def test_the_page_is_up_to_date() -> None:
    assert config_docs.PAGE.read_text(encoding="utf-8") == config_docs.page(), "run python -m tools.config_docs"


def test_every_field_is_explained() -> None:
    page = config_docs.page()
    for name, _ in flatten(Config()):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert len(row.split("|")[3].strip()) > 10, f"{name} has no docstring"
