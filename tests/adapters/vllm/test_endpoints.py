"""Health, traces and metrics, as a server answers for them."""

import asyncio
import json

import pytest

pytest.importorskip("prometheus_client")

from tests.adapters.vllm.asgi import Site
from tests.adapters.vllm.fakes import snapshot


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


async def test_a_fault_of_our_metrics_leaves_vllms_alone(caplog):
    broken = snapshot()
    del broken["steps"]
    _, _, body = await Site(snapshots=[broken]).request("GET", "/metrics")
    assert body == b"ok\n"
    assert "no metrics of ours" in caplog.text
