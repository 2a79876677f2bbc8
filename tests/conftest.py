"""What every test of this project gets."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """A command run in this process may set variables; the next test's child processes must not inherit them."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - before.keys():
        del os.environ[name]
    os.environ.update(before)
