"""How long a connection is waited for."""

import contextlib
from types import SimpleNamespace

import pytest

from impala_vllm.fleet.asking import Asking, AskingConfig
from impala_vllm.fleet.places import ServerId


class Waiting:
    """A session that keeps how long it is to wait for connections."""

    def __init__(self):
        self.reach_s = []

    @contextlib.asynccontextmanager
    async def get(self, url, headers, timeout):
        self.reach_s.append(timeout.sock_connect)

        async def read():
            return b""

        yield SimpleNamespace(status=200, read=read)


async def waited(scheme, is_down):
    session = Waiting()
    asking = Asking(ServerId(f"{scheme}://h:1"), session, {}, AskingConfig(reach_s=0.75))
    for num_failures in range(8):
        asking.look(is_down, num_failures)
        await asking.get("/health")
    return session.reach_s


async def test_every_fourth_look_at_one_that_is_down_leaves_a_handshake_its_time():
    assert await waited("https", is_down=True) == [0.75, 0.75, 0.75, None] * 2


async def test_a_connection_without_a_handshake_is_never_waited_for_long():
    assert await waited("http", is_down=True) == [0.75] * 8


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_one_that_is_up_may_take_its_time(scheme):
    assert await waited(scheme, is_down=False) == [None] * 8
