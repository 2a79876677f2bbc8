"""What requests may send: how much, all together, and how slowly."""

import asyncio

import pytest

from impala_vllm.fleet.proxy.bodies import Bodies, BodyConfig, BodyError, ClientGone


def sender(*messages):
    """What comes, one after the other, and then nothing."""
    waiting = list(messages)

    async def receive():
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    return receive


def part(data: bytes, more: bool = True):
    return {"type": "http.request", "body": data, "more_body": more}


async def test_a_body_is_held_until_it_is_released():
    bodies = Bodies(BodyConfig())
    body = await bodies.read([], sender(part(b"ab"), part(b"c", more=False)))
    assert (body.data, bodies.held_bytes) == (b"abc", 3)
    body.release()
    body.release()
    assert (body.data, bodies.held_bytes) == (b"", 0)


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"9")]])
async def test_one_that_is_too_large_is_refused_at_once_where_it_says_so(headers):
    bodies = Bodies(BodyConfig(max_bytes=8))
    receive = sender() if headers else sender(part(b"12345"), part(b"6789"))
    with pytest.raises(BodyError) as refused:
        await bodies.read(headers, receive)
    assert (refused.value.status, bodies.held_bytes) == (413, 0)


async def test_all_together_are_bounded():
    bodies = Bodies(BodyConfig(max_bytes=8, max_held_bytes=10))
    first = await bodies.read([], sender(part(b"123456", more=False)))
    for headers, receive in (([], sender(part(b"12345"))), ([(b"content-length", b"5")], sender())):
        with pytest.raises(BodyError) as refused:
            await bodies.read(headers, receive)
        assert refused.value.status == 503
        assert refused.value.retry_after_s
        assert bodies.held_bytes == 6
    first.release()
    assert (await bodies.read([], sender(part(b"12345", more=False)))).data == b"12345"


async def test_one_that_does_not_come_is_given_up():
    bodies = Bodies(BodyConfig(within_s=0.0))
    with pytest.raises(BodyError) as refused:
        await bodies.read([], sender(part(b"12")))
    assert (refused.value.status, bodies.held_bytes) == (408, 0)


async def test_nothing_is_held_for_a_client_that_has_left():
    bodies = Bodies(BodyConfig())
    with pytest.raises(ClientGone):
        await bodies.read([], sender(part(b"12"), {"type": "http.disconnect"}))
    assert bodies.held_bytes == 0
