"""Redis for this folder's tests, one server a module."""

import pytest

from tests.fleet.registry.serving import RedisServer


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()
