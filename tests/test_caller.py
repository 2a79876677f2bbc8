"""What requests say about where they come from."""

import json

import pytest

from impala_vllm.caller import Caller, add_body, add_fields, from_headers
from impala_vllm.config import MetadataConfig

CONFIG = MetadataConfig()


@pytest.mark.parametrize(
    ("headers", "session", "parent"),
    [
        ({}, None, None),
        ({"x-claude-code-session-id": "s"}, "s", None),
        ({"x-claude-code-session-id": "s", "x-claude-code-agent-id": "a"}, "s/a", "s"),
        (
            {
                "x-claude-code-session-id": "s",
                "x-claude-code-agent-id": "a",
                "x-claude-code-parent-agent-id": "b",
            },
            "s/a",
            "s/b",
        ),
        ({"session-id": "s", "thread-id": "t", "x-codex-parent-thread-id": "p"}, "t", "p"),
        ({"session-id": "s"}, "s", None),
        ({"thread-id": "forum-thread"}, None, None),
        ({"x-opencode-session": "s", "x-parent-session-id": "p"}, "s", "p"),
        ({"x-session-affinity": "s"}, "s", None),
        ({"x-litellm-session-id": "s"}, "s", None),
        ({"x-qwen-code-session-id": "s"}, "s", None),
        ({"x-opencode-session": "  "}, None, None),
        ({"x-opencode-session": "a\x00b"}, None, None),
    ],
)
def test_harness_headers_name_the_trace_and_its_parent(headers, session, parent):
    caller = from_headers(headers, CONFIG)
    assert (caller.session, caller.parent) == (session, parent)


def test_an_operators_header_goes_before_everything():
    config = MetadataConfig(session_headers=("X-Run",))
    caller = from_headers({"x-run": "r", "x-claude-code-session-id": "s"}, config)
    assert caller.envelope("from the body")["session"] == "r"


def test_vllms_own_session_id_goes_before_a_harness_header():
    assert from_headers({"x-opencode-session": "s"}, CONFIG).envelope("body")["session"] == "body"


@pytest.mark.parametrize(
    ("body", "session"),
    [
        ({"metadata": {"session_id": "m"}}, "m"),
        ({"litellm_session_id": "l"}, "l"),
        ({"metadata": {"user_id": "user_ab_account__session_0f-1"}}, "0f-1"),
        ({"metadata": {"user_id": "somebody"}}, None),
        ({"prompt_cache_key": "app-7"}, None),
        ({"user": "u", "metadata": {"session_id": 5}}, None),
        ({"metadata": "text"}, None),
        ([{"metadata": {"session_id": "m"}}], None),
    ],
)
def test_the_body_speaks_where_headers_are_silent(body, session):
    caller = Caller()
    add_body(caller, json.dumps(body).encode(), CONFIG)
    assert caller.session == session
    if isinstance(body, dict):
        add_fields(decoded := Caller(), body, CONFIG)
        assert decoded == caller


def test_prompt_cache_key_is_a_trace_only_where_configured():
    caller = Caller()
    add_body(caller, b'{"prompt_cache_key": "c"}', MetadataConfig(prompt_cache_key_is_session=True))
    assert caller.session == "c"


@pytest.mark.parametrize("body", [b"", b'{"metadata": ', b'\xff"metadata"', b'"metadata"'])
def test_a_body_that_is_no_request_says_nothing(body):
    caller = Caller()
    add_body(caller, body, CONFIG)
    assert caller.session is None


def test_the_tenant_is_the_digest_of_the_api_key_however_it_is_sent():
    bearer = from_headers({"authorization": "Bearer key-1"}, CONFIG).tenant
    assert bearer == from_headers({"x-api-key": "key-1"}, CONFIG).tenant
    assert bearer != from_headers({"authorization": "Bearer key-2"}, CONFIG).tenant
    assert "key-1" not in bearer
    assert from_headers({}, CONFIG).tenant == ""


def test_a_trusted_gateways_tenant_replaces_the_key():
    config = MetadataConfig(tenant_header="X-Team")
    assert from_headers({"x-team": "red", "authorization": "Bearer k"}, config).tenant == "red"
    assert from_headers({"authorization": "Bearer k"}, config).tenant == ""
