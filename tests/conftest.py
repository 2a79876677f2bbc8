"""What every test of this project gets."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")  # no test fails because the machine was slow


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """A command run in this process may set variables; the next test's child processes must not inherit them."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - before.keys():
        del os.environ[name]
    os.environ.update(before)
