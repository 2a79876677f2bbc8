"""Servers of one model, and how their prompts are hashed: as the first says whose handshake holds.

Others of the same model must hash the same or are routed by load. The tokenizer is loaded in a thread, and again and
again where that fails: most often it lies where the network does not reach just then.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from impala_vllm.fleet.hashing import Hello, Prompts, Scheme, Tokenizer, TokenizerError, handshake
from impala_vllm.fleet.pace import Pace
from impala_vllm.fleet.places import ServerId
from impala_vllm.fleet.server import Server

logger = logging.getLogger("impala.fleet")


@dataclass(slots=True)
class Family:
    """Servers of one model that hash alike."""

    hello: Hello
    scheme: Scheme
    members: set[ServerId] = field(default_factory=set[ServerId])
    """Servers that were believed; they may have gone since."""
    chats: str | None = None
    """How its chats are rendered here."""
    prompts: Prompts | None = None
    """None while the tokenizer loads, and where it cannot be."""
    was_tried: asyncio.Event = field(default_factory=asyncio.Event)
    """To load it, once."""


class Families:
    """One fleet's, by model."""

    def __init__(self, servers: Mapping[ServerId, Server], tokenizer: str | None, pace: Pace) -> None:
        """`servers`: those that are there, as they come and go. `tokenizer`: in place of what handshakes say."""
        self.on_loaded: Callable[[], None] = lambda: None
        """A tokenizer has been loaded."""
        self._servers = servers
        self._tokenizer = tokenizer
        self._pace = pace
        self._families: dict[str, Family] = {}
        self._loading: set[asyncio.Task[None]] = set()

    def get(self, model: str) -> Family | None:
        """Of a model, as handshakes name it."""
        return self._families.get(model)

    def greet(self, server: Server, hello: Hello) -> str | None:
        """Put the server into the family that its handshake names; what is wrong with its hashes, if anything.

        Raises HelloError.
        """
        scheme = handshake.scheme_of(hello)
        handshake.group_of(hello)
        family = self._families.get(hello.model)
        if family is None:
            family = self._families[hello.model] = Family(hello, scheme)
            self._loading.add(task := asyncio.create_task(self._load(family)))
            task.add_done_callback(self._loading.discard)
        differences = handshake.differences(family.hello, hello)
        family.members.discard(server.id)
        if differences and not family.members & self._servers.keys():  # all others have gone or moved on: a new version
            del self._families[hello.model]
            return self.greet(server, hello)
        if not differences:
            family.members.add(server.id)
        server.judge_chats(family.chats, hello)
        return "; ".join(differences) or None

    async def loaded(self) -> None:
        """Wait until tokenizers are loaded, or could not be at first."""
        for family in list(self._families.values()):
            await family.was_tried.wait()

    async def close(self) -> None:
        """Load no further."""
        for task in self._loading:
            task.cancel()
        await asyncio.gather(*self._loading, return_exceptions=True)

    async def _load(self, family: Family) -> None:
        """Until it is loaded, or another one has taken the family's place."""
        start_s, num_failures = time.monotonic(), 0
        try:
            while self._is_current(family):
                tokenizer = await self._try(family, num_failures)
                if tokenizer is not None:
                    if self._is_current(family):
                        self._take(family, tokenizer)
                        logger.info("tokenizer of %s loaded in %.1f s", family.hello.model, time.monotonic() - start_s)
                    return
                family.was_tried.set()
                num_failures += 1
                await asyncio.sleep(self._pace.again_s(num_failures))
        finally:
            family.was_tried.set()

    def _is_current(self, family: Family) -> bool:
        return self._families.get(family.hello.model) is family

    async def _try(self, family: Family, num_failures: int) -> Tokenizer | None:
        hello = family.hello
        try:
            return await asyncio.to_thread(Tokenizer, self._tokenizer or hello.tokenizer, hello.revision)
        except TokenizerError as e:
            if not num_failures:
                logger.error("%s; it is tried again: %s", _cannot(hello.model), e)
        except Exception:
            if not num_failures:
                logger.exception("%s; it is tried again", _cannot(hello.model))
        return None

    def _take(self, family: Family, tokenizer: Tokenizer) -> None:
        chats = handshake.chats_of(tokenizer.template, handshake.EXCLUDES_TOOLS)
        excludes_tools = family.hello.chats == chats
        family.prompts = Prompts(family.scheme, tokenizer, excludes_tools=excludes_tools)
        family.chats = chats if excludes_tools else handshake.chats_of(tokenizer.template)
        for server in self._servers.values():
            if server.hello is not None and server.hello.model == family.hello.model:
                server.judge_chats(family.chats)
        self.on_loaded()


def _cannot(model: str) -> str:
    return f"prompts of {model} cannot be hashed, its traces are routed by load"
