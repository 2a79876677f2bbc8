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


@pytest.mark.parametrize("limit", ["silence_s", "within_s"])
async def test_one_that_does_not_come_is_given_up(limit):
    bodies = Bodies(BodyConfig(**{limit: 0.0}))
    with pytest.raises(BodyError) as refused:
        await bodies.read([], sender(part(b"12")))
    assert (refused.value.status, bodies.held_bytes) == (408, 0)


class Clock(asyncio.SelectorEventLoop):
    """Time passes when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


@pytest.mark.parametrize(("num_parts", "is_taken"), [(20, True), (200, False)])
def test_a_slow_one_is_read_as_long_as_something_comes_and_not_for_ever(num_parts, is_taken):
    clock = Clock()
    bodies = Bodies(BodyConfig())
    parts = [part(b"x", more=number < num_parts) for number in range(1, num_parts + 1)]

    async def receive():
        clock.ahead_s += 30.0
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return parts.pop(0)

    try:
        if is_taken:
            assert clock.run_until_complete(bodies.read([], receive)).data == b"x" * num_parts
        else:
            with pytest.raises(BodyError, match="nothing of the body came for 60 s, or not all"):
                clock.run_until_complete(bodies.read([], receive))
            assert len(parts) > 100
    finally:
        clock.close()


async def test_refusals_are_counted_by_why():
    bodies = Bodies(BodyConfig(max_bytes=8, max_held_bytes=10, silence_s=0.0))
    bodies.held_bytes = 9
    for receive in (sender(part(b"123456789")), sender(part(b"12")), sender()):
        with pytest.raises(BodyError):
            await bodies.read([], receive)
    assert bodies.num_refused == {413: 1, 503: 1, 408: 1}


async def test_nothing_is_held_for_a_client_that_has_left():
    bodies = Bodies(BodyConfig())
    with pytest.raises(ClientGone):
        await bodies.read([], sender(part(b"12"), {"type": "http.disconnect"}))
    assert bodies.held_bytes == 0
