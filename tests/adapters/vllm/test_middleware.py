"""The middleware, driven as an ASGI server drives it."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("prometheus_client")

from impala_vllm.adapters.vllm.engine import current_caller, mark
from impala_vllm.adapters.vllm.middleware import Middleware
from impala_vllm.config import dump, load
from tests.adapters.vllm.fakes import FakeClient, FakeCore, FakeParams, snapshot


class Site:
    """An app that remembers what reached it, behind the middleware."""

    def __init__(self, api_keys=(), snapshots=None, chunks=(b"ok",), flags=None):
        self.core = FakeCore([snapshot()] if snapshots is None else snapshots)
        self.client = FakeClient(self.core, dump(load(None, flags)))
        args = SimpleNamespace(api_key=list(api_keys))
        self.app = SimpleNamespace(state=SimpleNamespace(engine_client=self.client, args=args))
        self.middleware = Middleware(self.inner)
        self.chunks = chunks
        self.body: Any = None
        self.caller: Any = None
        self.headers: Any = None
        self.pieces: list[Any] = []

    async def inner(self, scope, receive, send):
        self.headers = dict(scope["headers"])
        self.body = b""
        while scope["type"] == "http":
            message = await receive()
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.caller = current_caller.get()
        length = str(sum(map(len, self.chunks))).encode()
        headers = [(b"content-type", b"text/plain"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for i, chunk in enumerate(self.chunks):
            await send({"type": "http.response.body", "body": chunk, "more_body": i + 1 < len(self.chunks)})

    async def request(self, method, path, headers=None, parts=(b"",)):
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
            "app": self.app,
        }
        queue = [
            {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)
        ]

        async def receive():
            return queue.pop(0)

        async def send(message):
            self.pieces.append(message)

        self.pieces = []
        await self.middleware(scope, receive, send)
        body = b"".join(p.get("body", b"") for p in self.pieces[1:])
        return self.pieces[0]["status"], dict(self.pieces[0]["headers"]), body


JSON = {"Content-Type": "application/json"}


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


async def test_health_is_open_and_traces_need_the_key():
    site = Site(api_keys=["secret"])
    assert (await site.request("GET", "/impala/health"))[0] == 200
    assert (await site.request("GET", "/impala/traces"))[0] == 401
    assert (await site.request("GET", "/impala/traces", {"Authorization": "Bearer wrong"}))[0] == 401
    assert (await site.request("GET", "/impala/links", {"Authorization": "Bearer secret"}))[0] == 200
    assert site.body is None


async def test_health_answers_503_when_stalled_only():
    site = Site(snapshots=[snapshot(unfinished=1, stuck_s=1e6)])
    status, _, body = await site.request("GET", "/impala/health")
    assert status == 503
    assert json.loads(body)["status"] == "stalled"
    site.core.snapshots = [snapshot(identity={"on": False, "error": "x"})]
    status, _, body = await site.request("GET", "/impala/health")
    assert status == 200
    assert json.loads(body)["status"] == "degraded"


async def test_an_engine_that_does_not_answer_is_asked_once():
    site = Site(flags={"health.answer_within_s": ("test", 0.01)})
    site.core.answers = False
    for _ in range(3):
        status, _, body = await site.request("GET", "/impala/health")
        assert (status, json.loads(body)["status"]) == (200, "degraded")
    assert (await site.request("GET", "/impala/traces"))[0] == 503
    _, _, text = await site.request("GET", "/metrics")
    assert b"impala_up 0.0" in text
    assert len(site.core.pages) == 1
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=x", "limit=1001", "state=odd", "after=odd", "after=7", "after=1.2.3:t1", "page=2"]
)
async def test_bad_queries_are_refused_in_one_line(query):
    status, _, body = await Site().request("GET", f"/impala/traces?{query}")
    assert status == 400
    assert query.partition("=")[0] in json.loads(body)["error"]


async def test_the_page_asked_for_reaches_the_engine():
    site = Site()
    await site.request("GET", "/impala/traces?limit=5&state=gap&after=12.5:t3")
    assert site.core.pages == [{"of": "traces", "limit": 5, "state": "gap", "after": "12.5:t3"}]


async def test_unknown_paths_and_methods_are_refused():
    assert (await Site().request("GET", "/impala/else"))[0] == 404
    assert (await Site().request("POST", "/impala/traces"))[0] == 405


async def test_metrics_follow_vllms_own():
    site = Site(chunks=(b"vllm:x 1.0\n", b"vllm:y 2.0\n"))
    _, headers, body = await site.request("GET", "/metrics", {"Accept-Encoding": "gzip"})
    lines = body.decode().splitlines()
    assert lines[:2] == ["vllm:x 1.0", "vllm:y 2.0"]
    assert 'impala_links_total{engine="0",source="new"} 2.0' in lines
    assert "impala_up 1.0" in lines
    assert b"content-length" not in headers
    assert b"accept-encoding" not in site.headers


async def test_metrics_are_asked_for_as_plain_text_because_nothing_may_follow_the_end_of_openmetrics():
    from prometheus_client import CollectorRegistry, make_asgi_app

    site = Site()
    site.middleware._app = make_asgi_app(registry=CollectorRegistry())
    _, headers, body = await site.request("GET", "/metrics", {"Accept": "application/openmetrics-text;version=1.0.0"})
    assert b"text/plain" in headers[b"Content-Type"]
    assert b"impala_up 1.0" in body
    assert b"# EOF" not in body


async def test_nothing_is_appended_to_a_refusal():
    site = Site()

    async def refuse(scope, receive, send):
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})

    site.middleware._app = refuse
    assert await site.request("GET", "/metrics") == (404, {b"content-length": b"2"}, b"{}")


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


async def test_a_fault_of_our_metrics_leaves_vllms_alone(caplog):
    broken = snapshot()
    del broken["steps"]
    _, _, body = await Site(snapshots=[broken]).request("GET", "/metrics")
    assert body == b"ok\n"
    assert "no metrics of ours" in caplog.text


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


LEDGER = {"ledger.path": ("test", "/tmp/l.jsonl")}


async def post_outcome(site, body, headers=None):
    status, _, answer = await site.request("POST", "/impala/outcome", headers or JSON, [json.dumps(body).encode()])
    return status, json.loads(answer)


async def test_an_outcome_goes_to_every_engine_with_the_callers_tenant():
    site = Site(flags=LEDGER)
    site.core.outcomes = [0, 2]
    headers = {"Authorization": "Bearer one"}
    body = {"outcome": "success", "session_id": "s", "score": 0.75}
    assert await post_outcome(site, body, headers) == (200, {"traces": 2})
    (asked,) = site.core.pages
    assert {**asked, "tenant": "x"} == {"outcome": "success", "score": 0.75, "session_id": "s", "tenant": "x"}
    assert len(asked["tenant"]) == 16
    assert site.body is None, "vLLM must not see it"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"outcome": "success"}, "names 0 of"),
        ({"outcome": "success", "session_id": "a", "trace_id": "t1"}, "names 2 of"),
        ({"outcome": "It went well!", "session_id": "a"}, "outcome"),
        ({"session_id": "a"}, "outcome"),
        ({"outcome": "success", "session_id": "a", "prompt": "x"}, "prompt"),
        ([], "object"),
        ({"outcome": "success", "session_id": "x" * 9000}, "body"),
    ],
)
async def test_an_outcome_that_makes_no_sense_is_answered_in_one_line(body, says):
    site = Site(flags=LEDGER)
    status, answer = await post_outcome(site, body)
    assert status == 400
    assert says in answer["error"]
    assert not site.core.pages


async def test_an_outcome_of_an_unknown_trace_and_one_without_a_ledger_are_told_apart():
    site = Site(flags=LEDGER)
    site.core.outcomes = [0]
    body = {"outcome": "failure", "request_id": "cmpl-1"}
    assert (await post_outcome(site, body))[0] == 404
    assert (await post_outcome(Site(), body))[0] == 409
    slow = Site(flags={**LEDGER, "health.answer_within_s": ("test", 0.01)})
    slow.core.answers = False
    assert (await post_outcome(slow, body))[0] == 503


async def test_outcomes_are_posted_with_a_key_and_never_fetched():
    site = Site(api_keys=["k"], flags=LEDGER)
    body = {"outcome": "success", "session_id": "s"}
    assert (await post_outcome(site, body))[0] == 401
    assert (await post_outcome(site, body, {"Authorization": "Bearer k"}))[0] == 200
    assert (await site.request("GET", "/impala/outcome", {"Authorization": "Bearer k"}))[0] == 405
