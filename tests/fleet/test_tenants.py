"""Two tenants with different salts: what one sees of a prompt is the same whether the other has sent it or not.

What it can see is where its turn goes and why, what that costs, what of it is said to be in reach, and how long the
router takes, told here by the work that it does: text tokenised, keys looked up. Each test has its control: who
knows the salt does see a difference.
"""

import asyncio
from collections.abc import Sequence
from random import Random

import aiohttp
import pytest

from benchmarks.fleet.emulated import EmulatedServer
from benchmarks.fleet.serving import serving
from impala_vllm.core.types import Namespace, Outcome
from impala_vllm.fleet.addresses import parse_address
from impala_vllm.fleet.hashing import Prompts, Scheme
from impala_vllm.fleet.hashing.scheme import function
from impala_vllm.fleet.index import IndexConfig, MaskIndex
from impala_vllm.fleet.places import Replica, ServerId, Tier
from impala_vllm.fleet.proxy import Gateway, RouterOptions
from impala_vllm.fleet.residency import Residency
from impala_vllm.fleet.router import Router, Turn
from impala_vllm.fleet.scoring import Load, Policy, Reason
from impala_vllm.sim.timing import load

SCHEME = Scheme("sha256", function("sha256")("seed"), 16)
REPLICAS = [Replica(ServerId(name)) for name in "abcd"]
SECRET, OTHER = (Random(seed).sample(range(1000, 4000), 1000) for seed in (1, 2))


class Looked(list[int]):
    """Keys that count how often one of them is looked at."""

    num_looks = 0

    def __getitem__(self, at):
        self.num_looks += 1
        return super().__getitem__(at)


class Site:
    """A router, and engines that publish what they are sent."""

    def __init__(self, tokenizer) -> None:
        self.loads = {replica: Load(100_000) for replica in REPLICAS}
        self.router = Router(self.loads, Residency(MaskIndex(), IndexConfig()), Policy(), Random(1))
        self._prompts = Prompts(SCHEME, tokenizer)

    def turn(self, tokens: Sequence[int], salt: str, session: str | None = None) -> Turn:
        prompt = self._prompts.of_completion({"prompt": list(tokens), "cache_salt": salt})
        assert prompt is not None
        prompt = prompt._replace(keys=Looked(prompt.keys))
        return Turn(Namespace(salt=salt), prompt, 16, prompt.num_tokens, session)

    def serve(self, turn: Turn, *, to_the_end: bool = True) -> None:
        ticket = self.router.start(turn, self.loads, (), 0.0)
        assert ticket is not None
        if to_the_end:
            assert turn.prompt is not None
            self.router.answer(ticket, 0.1)
            self.router.residency.known.store(ticket.decision.replica, Tier.HBM, turn.prompt.keys, 0.1)
            self.router.end(ticket, Outcome.STOP, True, 0.2)


def seen(tokenizer, sent: Sequence[int], by: str, *, ends: bool, session: str | None = None) -> dict[str, object]:
    """All that is to be seen by whoever asks for SECRET under the salt `mallory`, after `by` has sent something."""
    site = Site(tokenizer)
    site.serve(site.turn(sent, by, session), to_the_end=ends)
    site.serve(site.turn([*sent, *range(500, 600)], by, session), to_the_end=ends)
    turn = site.turn(SECRET, "mallory", session)
    assert turn.prompt is not None
    plan = site.router.plan(turn, site.loads)
    depths = site.router.residency.depths(turn.prompt.keys)
    num_sharing = site.router.homes.num_sharing(turn.prompt.keys[0])
    ticket = site.router.start(turn, site.loads, (), 1.0)
    assert ticket is not None
    looks = turn.prompt.keys.num_looks
    return {"plan": plan, "depths": dict(depths), "sharing": num_sharing, "decision": ticket.decision, "looks": looks}


@pytest.mark.parametrize("session", [None, "the same for both"])
@pytest.mark.parametrize("ends", [True, False], ids=["served", "under way"])
def test_a_decision_and_its_work_are_those_for_a_prompt_that_nobody_has_sent(tokenizer, ends, session):
    after_secret = seen(tokenizer, SECRET, "alice", ends=ends, session=session)
    assert after_secret == seen(tokenizer, OTHER, "alice", ends=ends, session=session)
    assert not after_secret["depths"]
    assert not after_secret["sharing"]
    assert after_secret["decision"].reason is Reason.LOAD
    assert after_secret["decision"].cached_tokens == 0


@pytest.mark.parametrize("ends", [True, False], ids=["served", "under way"])
def test_the_same_tenant_does_see_it(tokenizer, ends):
    after_secret = seen(tokenizer, SECRET, "mallory", ends=ends)
    after_other = seen(tokenizer, OTHER, "mallory", ends=ends)
    assert after_secret["depths"]
    assert not after_other["depths"]
    assert after_secret["decision"] != after_other["decision"]
    assert after_secret["looks"] != after_other["looks"]


class Counting:
    """A tokenizer that counts the text it is given."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_chars = 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode(self, text: str) -> list[int]:
        self.num_chars += len(text)
        return self._tokenizer.encode(text)


def chat(word: str, salt: str) -> dict:
    return {"model": "emulated", "messages": [{"role": "user", "content": f"{word} " * 900}], "cache_salt": salt}


@pytest.mark.parametrize(("by", "is_equal"), [("alice", True), ("mallory", False)])
def test_a_prompt_that_another_tenant_has_sent_is_hashed_at_full_length(tokenizer, by, is_equal):
    work = []
    for sent in ("secret", "others"):
        counting = Counting(tokenizer)
        prompts = Prompts(SCHEME, counting)
        prompts.of_chat(chat(sent, by))
        counting.num_chars = 0
        found = prompts.of_chat(chat("secret", "mallory"))
        assert found is not None
        work.append((counting.num_chars, found.num_known_tokens))
    assert (work[0] == work[1]) is is_equal


async def test_clients_see_no_difference_either(tokenizer, model_dir):
    timing = load("h100-llama-3.1-8b")
    async with (
        EmulatedServer(tokenizer, timing, speed=1e6) as one,
        EmulatedServer(tokenizer, timing, speed=1e6) as two,
        aiohttp.ClientSession() as client,
    ):
        addresses = tuple(parse_address(server.url) for server in (one, two))
        gateway = Gateway(RouterOptions(addresses, tokenizer=str(model_dir), explains=True))

        async with serving(gateway.options, gateway) as url:

            async def ask(word: str, salt: str) -> tuple[str, str, int]:
                """Reason, tokens said to be in reach, tokens that were."""
                async with client.post(
                    url + "/v1/chat/completions", json=chat(word, salt) | {"max_tokens": 1}
                ) as response:
                    usage = (await response.json())["usage"]
                    _, reason, reach = response.headers["x-impala-decision"].split()
                return reason, reach.partition("/")[0], usage["prompt_tokens_details"]["cached_tokens"]

            first = await ask("secret", "alice")
            async with asyncio.timeout(60):
                while gateway.fleet.index.stats().num_blocks < 50:
                    await asyncio.sleep(0.01)
            assert await ask("secret", "mallory") == await ask("others", "trudy") == first
            assert (await ask("secret", "alice"))[2] > 500
