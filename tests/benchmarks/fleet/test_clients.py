"""Agents that send sessions: how many at once, what they tell, and what they count."""

import asyncio
from contextlib import asynccontextmanager
from random import Random

from aiohttp import web

from benchmarks.fleet import clients
from benchmarks.fleet.chats import Ask

SESSION = [Ask(0.0, [{"role": "user", "content": "hello"}], 1)] * 3


class Fake:
    """Answers at once, or breaks off; remembers who asked."""

    def __init__(self, answer: str = "data: [DONE]\n\n") -> None:
        self._answer = answer
        self.asked: list[str | None] = []
        self.ended: list[str] = []
        self.most = self._now = 0

    @asynccontextmanager
    async def serving(self):
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/finish_session", self._finish)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _complete(self, request: web.Request) -> web.Response:
        self.asked.append(request.headers.get("X-Session-ID"))
        self._now += 1
        self.most = max(self.most, self._now)
        for _ in range(50):  # while others may come
            await asyncio.sleep(0)
        self._now -= 1
        return web.Response(text=self._answer)

    async def _finish(self, request: web.Request) -> web.Response:
        self.ended.append(request.query["session_id"])
        return web.Response()


async def sent(fake: Fake, num_sessions: int, concurrency: int | None = None, is_told: bool = False) -> clients.Waited:
    async with fake.serving() as url, clients.http() as client:
        load = clients.Load(0.0, concurrency)
        told = url if is_told else None
        return await clients.send(client, [SESSION] * num_sessions, clients.in_turn([url]), load, Random(0), told)


async def test_all_turns_are_sent_without_a_word_on_whose_they_are():
    fake = Fake()
    waited = await sent(fake, 5)
    assert fake.asked == [None] * 15
    assert (len(waited.stalls_s), waited.num_failures) == (5, 0)
    assert not fake.ended


async def test_a_router_that_is_told_hears_of_each_session_and_of_its_end():
    fake = Fake()
    await sent(fake, 2, is_told=True)
    assert sorted(str(name) for name in fake.asked) == ["session-0"] * 3 + ["session-1"] * 3
    assert sorted(fake.ended) == ["session-0", "session-1"]


async def test_a_closed_loop_has_so_many_sessions_and_no_more():
    fake = Fake()
    waited = await sent(fake, 7, concurrency=2)
    assert len(waited.stalls_s) == 7
    assert fake.most <= 2


async def test_an_answer_that_tells_of_an_error_is_a_failure():
    waited = await sent(Fake('data: {"error": {"code": 500}}\n\ndata: [DONE]\n\n'), 2)
    assert waited.num_failures == 6


async def test_an_answer_without_its_end_is_a_failure():
    waited = await sent(Fake("data: {}\n\n"), 2)
    assert waited.num_failures == 6
