"""The tokenizer of the fleet's tests."""

from tests.fleet.conftest import model_dir, tokenizer

__all__ = ["model_dir", "tokenizer"]
