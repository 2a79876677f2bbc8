"""Requests of /v1/responses: the text that vLLM renders of their items, tools and reasoning."""

import copy

import pytest

from impala_vllm.fleet.hashing import chat, responses
from tests.fleet.hashing.rendering import rendered
from tests.fleet.hashing.test_chat import NO_DEVELOPER

TOOL = {
    "type": "function",
    "name": "run",
    "description": "Runs it.",
    "strict": True,
    "parameters": {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}},
}
CALL = {"type": "function_call", "call_id": "c1", "name": "run", "arguments": '{"b": "ls -l", "a": 2}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "a\nb"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is so."}]}
ASKED = {"role": "user", "content": [{"type": "input_text", "text": "look"}]}
TALKS = {
    "a text": "hi",
    "messages": [{"role": "developer", "content": "Be brief."}, ASKED, {"role": "assistant", "content": "no"}, ASKED],
    "a turn": [ASKED, THOUGHT, SAID, CALL, {**CALL, "call_id": "c2"}, RESULT, {**RESULT, "call_id": "c2"}],
    "calls alone": [ASKED, CALL, RESULT, CALL, RESULT, ASKED],
    "thoughts alone": [ASKED, THOUGHT, THOUGHT, SAID, SAID, ASKED],
    "a summary": [
        ASKED,
        {**THOUGHT, "content": None, "summary": [{"type": "summary_text", "text": "so"}]},
        CALL,
        RESULT,
    ],
    "a result in parts": [ASKED, CALL, {**RESULT, "output": [{"type": "input_text", "text": "part"}]}],
}
SETTINGS = {
    "alone": {},
    "instructions": {"instructions": "You are."},
    "tools": {"tools": [TOOL, {"type": "web_search_preview"}, {**TOOL, "name": "other", "strict": None}]},
    "built-in tools": {"tools": [{"type": "web_search_preview"}]},
    "no tools": {"tools": []},
    "effort": {"reasoning": {"effort": "low"}, "chat_template_kwargs": {"unheard_of": 1}},
}


def theirs(tokenizer, body, template) -> str:
    pytest.importorskip("vllm")
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.utils import construct_input_messages, construct_tool_dicts

    request = ResponsesRequest(**copy.deepcopy(body))
    messages = construct_input_messages(request_instructions=request.instructions, request_input=request.input)
    tools = construct_tool_dicts(request.tools, request.tool_choice)
    return rendered(tokenizer, request, messages, tools, template)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("more", SETTINGS)
@pytest.mark.parametrize("which", ["bundled", "by part"])
def test_the_text_is_the_one_vllm_renders(tokenizer, monkeypatch, talk, more, which):
    template = tokenizer.template if which == "bundled" else NO_DEVELOPER
    monkeypatch.setattr(tokenizer._whole, "chat_template", template)
    body = {"model": "m", "input": TALKS[talk], **SETTINGS[more]}
    before = copy.deepcopy(body)
    as_chat = responses.chat_of(body)
    assert as_chat is not None
    messages = chat.messages_of(as_chat, template)
    assert messages is not None
    variables = chat.variables_of(as_chat, chat.names_in(template))
    assert tokenizer.render(messages, chat.tools_of(as_chat), variables) == theirs(tokenizer, body, template)
    assert body == before


@pytest.mark.parametrize(
    "body",
    [
        {"input": "x", "previous_response_id": "resp_1"},
        {"input": "x", "tools": [{"type": "custom", "name": "patch"}]},
        {"input": "x", "tools": [{"type": "namespace", "name": "n", "tools": [TOOL]}]},
        {"input": "x", "tools": 7},
        {"input": "x", "reasoning": "low"},
        {"input": [{"type": "custom_tool_call", "name": "patch", "call_id": "c", "input": "x"}]},
        {"input": [{**CALL, "namespace": "n"}]},
        {"input": [{**CALL, "arguments": {}}]},
        {"input": [{**THOUGHT, "encrypted_content": "x"}]},
        {"input": [ASKED, {**SAID, "status": "incomplete"}]},
        {"input": [{**SAID, "content": [{"type": "refusal", "refusal": "no"}]}]},
        {"input": [{**SAID, "content": []}]},
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
        {"input": ["x"]},
        {"input": []},
        {},
    ],
)
def test_what_is_not_mirrored_is_left_alone(body):
    assert responses.chat_of(body) is None
