"""The handshake of an engine, believed by the router's own rules."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.distributed.kv_events import KVEventsConfig
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec

from impala_vllm.adapters.vllm import hello as hellos
from impala_vllm.adapters.vllm import snapshot
from impala_vllm.fleet.hashing import handshake
from tests.adapters.vllm.asgi import Site

SPEC = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=32, dtype=torch.float32)


def scheduler(algorithm: str, events: KVEventsConfig | None = None) -> Any:
    """The attributes of vLLM's scheduler that a handshake reads."""
    kv_cache_utils.init_none_hash(get_hash_fn_by_name(algorithm))
    return SimpleNamespace(
        vllm_config=SimpleNamespace(cache_config=SimpleNamespace(prefix_caching_hash_algo=algorithm)),
        hash_block_size=16,
        kv_cache_config=SimpleNamespace(num_blocks=100, kv_cache_groups=[KVCacheGroupSpec(["layer"], SPEC)]),
        get_kv_event_publisher_config=lambda: events,
    )


def model_config() -> Any:
    model = {"model": "m", "revision": None, "tokenizer": "m", "dtype": torch.bfloat16, "max_model_len": 4096}
    return SimpleNamespace(**model)


async def ask(site: Site, scheduler: Any) -> tuple[int, bytes]:
    site.core.snapshots = [snapshot.take(scheduler, 0, {"of": "hello"})]
    site.client.vllm_config.model_config = model_config()
    site.client.vllm_config.cache_config = SimpleNamespace(enable_prefix_caching=True)
    status, _, body = await site.request("GET", "/impala/hello")
    return status, body


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"])
async def test_what_an_engine_says_is_proved_by_its_example(algorithm):
    events = KVEventsConfig(enable_kv_cache_events=True, endpoint="tcp://*:5557", replay_endpoint="tcp://*:6557")
    status, body = await ask(Site(), scheduler(algorithm, events))
    assert status == 200
    hello = handshake.read(body)
    assert handshake.scheme_of(hello).none_hash == kv_cache_utils.NONE_HASH
    assert handshake.group_of(hello) == 0
    assert hello.dtype == "bfloat16"
    assert hello.ranks[0].hbm_tokens == 1600
    assert hello.ranks[0].events == handshake.EventsAt("tcp://*:5557", "tcp://*:6557")


async def test_events_that_are_off_are_said_to_be():
    for config in (None, KVEventsConfig(enable_kv_cache_events=False)):
        _, body = await ask(Site(), scheduler("sha256", config))
        assert handshake.read(body).ranks[0].events is None


async def test_the_handshake_needs_the_key_that_the_server_needs():
    status, _, _ = await Site(api_keys=["secret"]).request("GET", "/impala/hello")
    assert status == 401


async def test_an_engine_that_does_not_answer_is_said_so():
    site = Site(flags={"health.answer_within_s": ("--t", 0.05)})
    site.core.answers = False
    status, _, body = await site.request("GET", "/impala/hello")
    assert status == 503
    assert "does not answer" in json.loads(body)["error"]


def renders(
    own: Any, given: Any = None, kind: str = "auto", variables: Any = None, harmony=False, excludes=False
) -> Any:
    """The part of the application's state that renders chats."""
    tokenizer = SimpleNamespace(chat_template=own)
    renderer = SimpleNamespace(
        use_harmony=harmony,
        renderer=SimpleNamespace(tokenizer=tokenizer),
        chat_template=given,
        chat_template_content_format=kind,
        default_chat_template_kwargs=variables or {},
        exclude_tools_when_tool_choice_none=excludes,
    )
    return SimpleNamespace(online_renderer=renderer)


def test_how_chats_are_rendered_is_told_by_a_digest_that_changes_with_it():
    plain = handshake.chats_of("{{ own }}")
    assert hellos.chats(renders("{{ own }}")) == plain
    assert hellos.chats(renders({"default": "{{ own }}", "tool_use": "x"})) == plain
    assert hellos.chats(renders("x", given="{{ own }}")) == plain
    others = [
        renders("{{ own }}", given="{{ other }}"),
        renders({"default": "{{ own }}", "tool_use": "x"}, given="tool_use"),
        renders("{{ own }}", kind="openai"),
        renders("{{ own }}{{ enable_thinking }}", variables={"enable_thinking": False}),
        renders("{{ own }}", harmony=True),
        renders("{{ own }}", excludes=True),
    ]
    assert hellos.chats(renders("{{ own }}", variables={"cohere_format": "cmd4"})) == plain, "vLLM says so to everybody"
    digests = {hellos.chats(state) for state in others}
    assert len(digests | {plain}) == 7
    assert handshake.chats_of("{{ own }}", handshake.EXCLUDES_TOOLS) in digests
    assert None not in digests
    for silent in (SimpleNamespace(), SimpleNamespace(online_renderer=SimpleNamespace()), renders(None)):
        assert hellos.chats(silent) is None


async def test_the_digest_is_in_the_handshake():
    site = Site()
    site.app.state.online_renderer = renders("{{ own }}").online_renderer
    _, body = await ask(site, scheduler("sha256"))
    assert handshake.read(body).chats == handshake.chats_of("{{ own }}")
