"""What passes through the middleware, and what it tells the engine of it."""

from types import SimpleNamespace

import pytest

pytest.importorskip("prometheus_client")

from impala_vllm.adapters.vllm.engine import current_caller, mark
from tests.adapters.vllm.asgi import JSON, Site
from tests.adapters.vllm.fakes import FakeParams


async def test_the_body_passes_untouched_while_ids_are_read_along():
    site = Site()
    body = b'{ "metadata":{"session_id":"s-1"},  "messages": [1.0, 1e400] }'
    await site.request("POST", "/v1/chat/completions", JSON, [body[:9], body[9:30], body[30:]])
    assert site.body == body
    assert site.caller.session == "s-1"


async def test_the_caller_ends_with_its_request():
    site = Site()
    await site.request("POST", "/v1/completions", {"X-OpenCode-Session": "s"})
    assert site.caller.session == "s"
    assert current_caller.get() is None


async def test_responses_are_not_buffered():
    site = Site(chunks=(b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"))
    await site.request("POST", "/v1/chat/completions", JSON, [b"{}"])
    assert len(site.pieces) == 4


async def test_bodies_that_are_not_json_are_not_read():
    site = Site()
    await site.request(
        "POST", "/v1/audio", {"Content-Type": "multipart/form-data"}, [b'{"metadata":{"session_id":"s"}}']
    )
    assert site.caller.session is None


async def test_requests_are_marked_on_their_way_to_the_engine():
    site = Site()
    await site.request("GET", "/v1/models")
    request = SimpleNamespace(sampling_params=FakeParams({"other": 1}), session_id=None)

    async def inner(scope, receive, send):
        await site.client.engine_core.add_request_async(request)

    site.middleware._app = inner
    with pytest.raises(IndexError):  # this inner answers nothing
        await site.request("POST", "/v1/completions", {"Authorization": "Bearer k", "X-OpenCode-Session": "s"})
    assert site.core.added == [request]
    extra = request.sampling_params.extra_args
    assert extra["other"] == 1
    assert extra["impala"]["session"] == "s"
    assert len(extra["impala"]["tenant"]) == 16


def test_what_a_client_forged_is_removed():
    request = SimpleNamespace(sampling_params=FakeParams({"impala": {"tenant": "victim"}}), session_id=None)
    mark(request, None)
    assert request.sampling_params.extra_args is None


def test_pooling_requests_are_left_alone():
    mark(SimpleNamespace(sampling_params=None, session_id=None), None)


async def test_a_body_nested_without_end_says_nothing_and_passes():
    site = Site()
    body = b'{"metadata":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert (await site.request("POST", "/v1/chat/completions", JSON, [body]))[0] == 200
    assert site.body == body
    assert site.caller.session is None


async def test_a_middleware_that_cannot_reach_the_engine_lets_everything_pass(caplog):
    site = Site()
    del site.client.vllm_config
    for _ in range(2):
        assert (await site.request("POST", "/v1/completions", JSON, [b"{}"]))[0] == 200
    assert site.caller is None
    assert [r.message for r in caplog.records].count(
        "impala: the middleware failed and is switched off, serving continues"
    ) == 1


async def test_a_websocket_has_a_tenant_too():
    callers = []

    async def inner(scope, receive, send):
        callers.append(current_caller.get())

    site = Site()
    site.middleware._app = inner
    for key in (b"Bearer one", b"Bearer two"):
        headers = [(b"authorization", key)]
        scope = {"type": "websocket", "path": "/v1/realtime", "headers": headers, "app": site.app}
        await site.middleware(scope, None, None)  # type: ignore[arg-type]
    assert len({caller.tenant for caller in callers}) == 2
    assert current_caller.get() is None


async def test_other_traffic_and_servers_without_an_engine_pass():
    site = Site(snapshots=[])
    site.app.state = SimpleNamespace()
    await site.request("GET", "/metrics")
    assert site.body == b""
