"""Servers that come and go: by hand, by a file that is rewritten, and as they are asked."""

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Callable
from random import Random

import aiohttp
import pytest
import zmq.asyncio
from aiohttp.client_reqrep import ConnectionKey

from benchmarks.fleet.emulated import EmulatedServer
from impala_vllm.fleet import families, feeds
from impala_vllm.fleet.addresses import Address, AddressError, parse_address, parse_file
from impala_vllm.fleet.asking import AskingConfig
from impala_vllm.fleet.events import Endpoints
from impala_vllm.fleet.fleet import Fleet
from impala_vllm.fleet.hashing import TokenizerError, handshake
from impala_vllm.fleet.index import MaskIndex
from impala_vllm.fleet.pace import Pace
from impala_vllm.fleet.places import Replica
from impala_vllm.fleet.server import Hooks, Server, State
from impala_vllm.sim.timing import load

A, B = (parse_address(f"http://127.0.0.1:{port}") for port in (1, 2))
SELDOM = AskingConfig(every_s=1000.0, down_every_s=1000.0)
TIMING = load("h100-llama-3.1-8b")


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.005)


def busy(fleet: Fleet, address: Address) -> None:
    fleet.loads[Replica(address.url)].start(1.0)


async def test_a_server_that_is_added_while_it_drains_stays():
    async with Fleet(MaskIndex(), config=SELDOM) as fleet:
        server = fleet.add(A)
        busy(fleet, A)
        removing = asyncio.create_task(fleet.remove(A.url, 1000.0))
        await until(lambda: server.state is State.DRAINING)
        assert fleet.add(A) is server
        assert server.state is State.NEW
        assert not await removing
        assert fleet.servers == {A.url: server}


async def test_of_two_that_remove_a_server_one_has_done_it():
    async with Fleet(MaskIndex(), config=SELDOM) as fleet:
        fleet.add(A)
        busy(fleet, A)
        removing = [asyncio.create_task(fleet.remove(A.url, 1000.0)) for _ in range(2)]
        await asyncio.sleep(0)
        fleet.loads[Replica(A.url)].end()
        assert sorted(await asyncio.gather(*removing)) == [False, True]
        assert not fleet.servers
        assert not fleet.loads


async def test_a_server_that_is_down_is_looked_at_before_its_turn(tokenizer):
    server = EmulatedServer(tokenizer, TIMING, has_events=False)
    async with server:
        address = parse_address(server.url)
    async with Fleet(MaskIndex(), config=AskingConfig(every_s=1000.0, down_every_s=0.01)) as fleet:
        known = fleet.add(address)
        await until(lambda: known.state is State.DOWN)
        async with EmulatedServer(tokenizer, TIMING, has_events=False, port=int(server.url.rpartition(":")[2])):
            await until(lambda: known.state is State.UP)


@contextlib.asynccontextmanager
async def following(path, *known: Address) -> AsyncIterator[Fleet]:
    async with Fleet(MaskIndex(), config=SELDOM) as fleet:
        for address in known:
            fleet.add(address)
        task = asyncio.create_task(fleet.follow_file(path, every_s=0.01))
        await until(lambda: fleet.servers.keys() == {A.url, B.url})
        yield fleet
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_file_that_reads_as_empty_lets_nobody_go(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    path = tmp_path / "workers"
    path.write_text(f"{A.url}\n{B.url}\n")
    async with following(path) as fleet:
        path.write_text("")
        await until(lambda: "it is empty" in caplog.text)
        assert State.DRAINING not in [server.state for server in fleet.servers.values()]
        path.write_text("# nobody\n")
        await until(lambda: not fleet.servers)


async def test_a_line_that_comes_back_keeps_its_server(tmp_path):
    path = tmp_path / "workers"
    path.write_text(f"{A.url}\n{B.url}\n")
    async with following(path) as fleet:
        busy(fleet, B)
        server = fleet.servers[B.url]
        path.write_text(f"{A.url}\n")
        await until(lambda: server.state is State.DRAINING)
        path.write_text(f"{A.url}\n{B.url}\n")
        await until(lambda: server.state is not State.DRAINING)
        assert fleet.servers[B.url] is server


async def test_a_line_that_names_other_events_has_them_followed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "workers"
    path.write_text(f"{A.url}\n{B.url}\n")
    async with following(path) as fleet:
        server = fleet.servers[A.url]
        path.write_text(f"{A.url}=tcp://127.0.0.1:7,tcp://127.0.0.1:8\n{B.url}\n")
        await until(lambda: server.address.events is not None)
        assert server.address.events == Endpoints("tcp://127.0.0.1:7", "tcp://127.0.0.1:8")
        path.write_text(f"{A.url}\n{B.url}\n")
        await until(lambda: server.address.events is None)
        said = [r.getMessage() for r in caplog.records if "its events are read" in r.getMessage()]
        assert len(said) == 2


async def test_a_line_without_events_takes_none_from_a_server_that_was_told_of_them_elsewhere(tmp_path):
    path = tmp_path / "workers"
    path.write_text(f"{A.url}\n{B.url}\n")
    events = Endpoints("tcp://127.0.0.1:7")
    async with following(path, A._replace(events=events)) as fleet:
        await until(lambda: A.url in fleet.listed)
        assert fleet.servers[A.url].address.events == events


def test_a_server_that_is_listed_twice_publishes_at_one_place():
    assert parse_file(f"{A.url}\n{A.url}\n", "workers") == [A]
    with pytest.raises(AddressError, match=r"workers:2: .* is listed before"):
        parse_file(f"{A.url}\n{A.url}=tcp://h:1\n", "workers")


async def test_what_else_lets_a_listed_server_go_does_not_last(tmp_path):
    path = tmp_path / "workers"
    path.write_text(f"{A.url}\n{B.url}\n")
    async with following(path) as fleet:
        assert await fleet.remove(A.url)
        await until(lambda: A.url in fleet.servers)


class Asked:
    """A server that is asked by hand."""

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        context: zmq.asyncio.Context,
        silence_s: float = 0.0,
        details_every_s: float = 0.0,
    ) -> None:
        self.problem: str | None = None
        self.lost: list[Replica] = []
        hooks = Hooks(lambda *_: self.problem, lambda _: None, self.lost.append)
        config = AskingConfig(details_every_s=details_every_s, failures=1, silence_s=silence_s)
        self.pace = Pace(config, Random(0))
        self.server = Server(parse_address(url), MaskIndex(), session, context, {}, hooks, config, self.pace)


@pytest.fixture
async def asked(tokenizer):
    context = zmq.asyncio.Context()
    async with EmulatedServer(tokenizer, TIMING) as emulated, aiohttp.ClientSession() as session:
        found = Asked(emulated.url, session, context)
        yield found
        await found.server.close()
    context.destroy(linger=0)


async def test_feeds_start_and_end_with_what_is_thought_of_a_servers_hashes(asked):
    asked.problem = "other hashes"
    await asked.server.ask()
    assert not asked.server.feeds.followers
    assert "hashes are not used" in asked.server.feeds.problem
    asked.problem = None
    await asked.server.ask()
    assert list(asked.server.feeds.followers) == asked.server.replicas
    assert asked.server.feeds.problem is None
    follower = asked.server.feeds.followers[asked.server.replicas[0]]
    await asked.server.ask()
    assert asked.server.feeds.followers[asked.server.replicas[0]] is follower
    assert not asked.lost
    asked.problem = "other hashes"
    await asked.server.ask()
    assert not asked.server.feeds.followers
    assert asked.lost == asked.server.replicas


async def test_events_that_moved_are_read_where_they_are_now_and_nothing_is_kept_of_before(asked):
    server = asked.server
    await server.ask()
    (replica,) = server.replicas
    first = server.feeds.followers[replica]
    handshaken = server.feeds._endpoints(server.hello.ranks[0])
    server.publishes(Endpoints("tcp://127.0.0.1:7"))
    await server.ask()
    assert asked.lost == [replica]
    assert server.feeds.followers[replica] is not first
    assert server.feeds._endpoints(server.hello.ranks[0]).events == "tcp://127.0.0.1:7"
    assert "no replay endpoint" in server.feeds.problem
    second = server.feeds.followers[replica]
    server.publishes(Endpoints("tcp://127.0.0.1:7"))
    await server.ask()
    assert server.feeds.followers[replica] is second
    server.publishes(None)
    await server.ask()
    assert server.feeds._endpoints(server.hello.ranks[0]) == handshaken
    assert server.feeds.problem is None


async def test_a_feed_that_failed_is_started_again(asked, monkeypatch, caplog):
    class Failing(feeds.Feed):
        async def run(self) -> None:
            raise RuntimeError("poison")

    with monkeypatch.context() as patch:
        patch.setattr(feeds, "Feed", Failing)
        await asked.server.ask()
    (failed,) = asked.server.feeds._tasks
    await asyncio.wait([failed])
    await asked.server.ask()
    assert "following its events failed" in caplog.text
    (feed,) = asked.server.feeds._tasks
    assert feed is not failed
    assert not feed.done()


async def test_a_router_out_of_descriptors_blames_no_server_and_says_so_once(asked, monkeypatch, caplog):
    await asked.server.ask()
    key = ConnectionKey("127.0.0.1", 1, False, True, None, None, None)

    async def fails(code: int) -> None:
        async def get(path: str) -> tuple[int, bytes]:
            raise aiohttp.ClientConnectorError(key, OSError(code, "no"))

        monkeypatch.setattr(asked.server.asking, "get", get)
        await asked.server.ask()

    for code in (errno.EMFILE, errno.ENFILE):
        await fails(code)
        assert asked.server.state is State.UP
    assert len([r for r in caplog.records if "servers cannot be asked" in r.getMessage()]) == 1
    await fails(errno.ECONNREFUSED)
    assert asked.server.state is State.DOWN


async def test_a_server_that_speaks_tls_has_time_for_it_at_every_fourth_look(monkeypatch):
    context = zmq.asyncio.Context()
    async with aiohttp.ClientSession() as session:
        server = Asked("https://127.0.0.1:1", session, context).server
        hurried: list[bool] = []

        async def refused(path: str) -> tuple[int, bytes]:
            hurried.append(server.asking.hurries)
            raise ConnectionRefusedError(errno.ECONNREFUSED, "no")

        monkeypatch.setattr(server.asking, "get", refused)
        for _ in range(8):
            await server.ask()
        assert hurried == [False, True, True, False, True, True, True, False]
    context.destroy(linger=0)


@pytest.mark.parametrize("answer", [TimeoutError(), (503, b"")])
async def test_a_server_that_comes_back_without_its_handshake_is_asked_for_it_at_the_next_look(answer, monkeypatch):
    context = zmq.asyncio.Context()
    async with aiohttp.ClientSession() as session:
        server = Asked("http://127.0.0.1:1", session, context, details_every_s=1000.0).server
        asked: list[str] = []

        async def get(path: str) -> tuple[int, bytes]:
            asked.append(path)
            if path != "/impala/hello":
                return 200, b'{"data": []}'
            if asked.count(path) > 1:
                return 404, b""
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(server.asking, "get", get)
        for _ in range(4):
            await server.ask()
            assert server.state is State.UP
        assert asked.count("/impala/hello") == 2
    context.destroy(linger=0)


async def test_those_that_are_down_are_counted_until_they_are_up_or_gone(asked, monkeypatch):
    async def refused(path: str) -> tuple[int, bytes]:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "no")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(asked.server.asking, "get", refused)
            for _ in range(3):
                await asked.server.ask()
            assert asked.pace.num_down == 1
        await asked.server.ask()
        assert asked.pace.num_down == 0
    asked.server.suspect()
    asked.server.drain()
    assert asked.pace.num_down == 0


async def test_requests_end_when_their_server_is_silent_and_not_when_it_only_refuses(asked, monkeypatch):
    await asked.server.ask()
    outcomes: list[str] = []

    async def request() -> None:
        try:
            async with asked.server.flight():
                await asyncio.Event().wait()
        except TimeoutError:
            outcomes.append("given up")

    async def refused(path: str) -> tuple[int, bytes]:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "no")

    async def silent(path: str) -> tuple[int, bytes]:
        raise TimeoutError

    waiting = asyncio.create_task(request())
    await asyncio.sleep(0)
    monkeypatch.setattr(asked.server.asking, "get", refused)
    await asked.server.ask()
    assert asked.server.state is State.DOWN
    done, _ = await asyncio.wait([waiting], timeout=0.01)
    assert not done
    monkeypatch.setattr(asked.server.asking, "get", silent)
    await asked.server.ask()
    await waiting
    assert outcomes == ["given up"]


async def test_a_network_that_is_away_for_seconds_breaks_no_answer(monkeypatch):
    context = zmq.asyncio.Context()
    async with aiohttp.ClientSession() as session:
        server = Asked("http://127.0.0.1:1", session, context, silence_s=20.0).server

        async def silent(path: str) -> tuple[int, bytes]:
            raise TimeoutError

        monkeypatch.setattr(server.asking, "get", silent)
        async with server.flight():
            server.suspect()
            for _ in range(10):  # as many as are made of one that is down while a network blips
                await server.ask()
            await asyncio.sleep(0)
        assert server.state is State.DOWN
    context.destroy(linger=0)


async def test_a_server_that_renders_chats_otherwise_is_known_by_what_it_was_sent(tokenizer, model_dir, caplog):
    caplog.set_level(logging.WARNING)
    async with EmulatedServer(tokenizer, TIMING) as one, EmulatedServer(tokenizer, TIMING) as other:
        one.chats, other.chats = handshake.chats_of(tokenizer.template), "of its own"
        async with Fleet(MaskIndex(), tokenizer=str(model_dir), config=SELDOM) as fleet:
            same, odd = (fleet.add(parse_address(server.url)) for server in (one, other))
            await fleet.settled()
            assert same.chat_problem is None
            assert "renders chats otherwise" in caplog.text
            assert "--tokenizer DIR" in odd.chat_problem
            for server in (one, other):
                assert server.publisher is not None
                await server.publisher.publish(server.publisher.stored([]))
            await until(lambda: fleet.has_events(same.replicas[0]))
            follower = odd.feeds.followers[odd.replicas[0]]
            await until(lambda: follower.counts.batches > 0)
            assert not fleet.has_events(odd.replicas[0])


@pytest.mark.parametrize("excludes", [True, False])
async def test_tools_are_left_out_of_chats_as_the_server_says(tokenizer, model_dir, excludes):
    async with EmulatedServer(tokenizer, TIMING, has_events=False) as server:
        server.chats = handshake.chats_of(tokenizer.template, *([handshake.EXCLUDES_TOOLS] if excludes else []))
        async with Fleet(MaskIndex(), tokenizer=str(model_dir), config=SELDOM) as fleet:
            known = fleet.add(parse_address(server.url))
            await fleet.settled()
            assert known.chat_problem is None
            family = fleet.families.get("emulated")
            assert family is not None
            assert family.prompts is not None
            asked, tool = {"role": "user", "content": "go on " * 50}, {"name": "run", "parameters": {"type": "object"}}
            chat = {"messages": [asked], "tools": [{"type": "function", "function": tool}]}
            response = {"input": [asked], "tools": [{"type": "function", **tool}]}
            for make, body in ((family.prompts.of_chat, chat), (family.prompts.of_response, response)):
                without, with_tools = make({**body, "tools": None}), make({**body, "tool_choice": "auto"})
                assert without is not None
                assert with_tools is not None
                assert list(without.keys) != list(with_tools.keys)
                assert make({**body, "tool_choice": "none"})[:2] == (without if excludes else with_tools)[:2]


async def test_a_tokenizer_that_could_not_be_loaded_is_tried_again_and_said_once(tokenizer, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    answers = [TokenizerError("the hub is away"), RuntimeError("disk on fire"), TokenizerError("still away"), tokenizer]
    tried: list[str] = []

    def load_it(name: str, revision: str | None) -> object:
        tried.append(name)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(families, "Tokenizer", load_it)
    config = AskingConfig(every_s=0.01)
    async with (
        EmulatedServer(tokenizer, TIMING, has_events=False) as server,
        Fleet(MaskIndex(), tokenizer="somewhere", config=config) as fleet,
    ):
        known = fleet.add(parse_address(server.url))
        await fleet.settled()
        assert known.hello is not None
        family = fleet.families.get(known.hello.model)
        await until(lambda: family.prompts is not None)
    assert tried == ["somewhere"] * 4
    assert len([r for r in caplog.records if "cannot be hashed" in r.getMessage()]) == 1
    assert any("loaded in" in r.getMessage() for r in caplog.records)


async def test_an_unexpected_failure_of_a_tokenizer_is_said_with_its_place(tokenizer, monkeypatch, caplog):
    def load_it(name: str, revision: str | None) -> object:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(families, "Tokenizer", load_it)
    async with (
        EmulatedServer(tokenizer, TIMING, has_events=False) as server,
        Fleet(MaskIndex(), tokenizer="somewhere", config=SELDOM) as fleet,
    ):
        fleet.add(parse_address(server.url))
        await fleet.settled()
        (record,) = [r for r in caplog.records if "cannot be hashed" in r.getMessage()]
        assert record.exc_info is not None
