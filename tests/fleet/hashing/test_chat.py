"""Chats as vLLM shapes them: the same text in front of the tokenizer, field for field."""

import copy

import pytest

from impala_vllm.fleet.hashing import chat
from tests.fleet.hashing.rendering import rendered

TOOL = {
    "function": {
        "parameters": {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}},
        "name": "run",
        "strict": True,
    },
    "type": "function",
}
CALL = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": '{"b": "ls -l", "a": 2}'}}
TALKS = {
    "plain": [{"role": "user", "content": "hi"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "x-anthropic-billing-header: cch=1\nYou are."}]},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ],
    "billing alone": [
        {"role": "system", "content": [{"type": "text", "text": "x-anthropic-billing-header: cch=1"}]},
        {"role": "user", "content": "hi"},
    ],
    "a tool call": [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {
            "role": "tool",
            "tool_call_id": "c1",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "user", "content": "and?"},
    ],
    "broken arguments": [
        {"role": "user", "content": "look"},
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "run", "arguments": "{broken"}}]},
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "run", "arguments": "[1]"}}]},
        {"role": "assistant", "tool_calls": [], "content": "no"},
    ],
    "reasoning": [
        {"role": "user", "content": "think"},
        {"role": "assistant", "content": "done", "reasoning": "hm"},
        {"role": "user", "content": "and?", "name": "Ann"},
    ],
    "developer": [
        {"role": "system", "content": "One."},
        {"role": "user", "content": "hi"},
        {"role": "developer", "content": "Two."},
    ],
}
NO_DEVELOPER = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content -%}{{- '[' + part.text + ']' -}}{%- endfor -%}{%- endif -%}
{{- (message.reasoning_content or '') + (message.name or '') + '<|im_end|>\n' -}}
{%- endfor -%}{{- (tools or []) | tojson -}}{{- reasoning_effort | default('none') -}}
{{- enable_thinking | default('?') -}}{{- tools is none -}}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def theirs(tokenizer, body, template):
    """The text as vLLM renders it, from the body as its API receives it."""
    pytest.importorskip("vllm")
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    request = ChatCompletionRequest(**copy.deepcopy(body))
    tools = [tool.model_dump() for tool in request.tools] if request.tools else None
    return rendered(tokenizer, request, request.messages, tools, template)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tools": [TOOL]},
        {"reasoning_effort": "low"},
        {"chat_template_kwargs": {"enable_thinking": False, "conversations": [], "unheard_of": 1}},
    ],
    ids=["alone", "tools", "effort", "variables"],
)
@pytest.mark.parametrize("which", ["bundled", "by part"])
def test_the_text_is_the_one_vllm_renders(tokenizer, monkeypatch, talk, more, which):
    template = tokenizer.template if which == "bundled" else NO_DEVELOPER
    monkeypatch.setattr(tokenizer._whole, "chat_template", template)
    body = {"model": "m", "messages": TALKS[talk], **more}
    expected = theirs(tokenizer, body, template)
    before = copy.deepcopy(body)
    messages = chat.messages_of(body, template)
    assert messages is not None
    variables = chat.variables_of(body, chat.names_in(template))
    assert tokenizer.render(messages, chat.tools_of(body), variables) == expected
    assert body == before


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": 1, "content": "x"}]},
        {"messages": ["x"]},
        {"messages": "x"},
        {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"},
        {"messages": [{"role": "user", "content": "x"}], "documents": [{"text": "d"}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]},
        {},
    ],
)
def test_what_is_not_mirrored_is_left_alone(body):
    assert chat.messages_of(body, "") is None


HI = [{"role": "user", "content": "hi"}]
REFUSED = {
    "a template": {"chat_template": "{{ 'x' * 10**11 }}"},
    "tokens": {"tokenize": True},
    "tools": {"tools": ["x"]},
    "other messages": {"conversation": []},
    "a repetition": {"width": 10**11},
    "a repetition below": {"width": {"a": [10**11]}},
    "no number": {"width": float("inf")},
    "no object": ["width", 7],
}


@pytest.mark.parametrize("own", REFUSED.values(), ids=REFUSED)
def test_what_a_client_must_not_set_is_not_rendered(own):
    body = {"messages": HI, "chat_template_kwargs": own}
    with pytest.raises(ValueError, match=r"not for a client|too much"):
        chat.variables_of(body, {"width", "tools", "messages"})


@pytest.mark.parametrize("own", [{"chat_template": "{{ 'x' * 7 }}"}, {"tokenize": True}])
def test_vllm_refuses_the_same(tokenizer, own):
    hf = pytest.importorskip("vllm.renderers.hf")
    with pytest.raises(ValueError, match="unexpected"):
        hf.resolve_chat_template_kwargs(tokenizer._whole, tokenizer.template, own)


def test_what_every_message_could_print_is_bounded():
    wide = {"chat_template_kwargs": {"bos_token": "x" * 4096}}
    assert chat.variables_of({"messages": HI, **wide}, {"bos_token"})["bos_token"] == "x" * 4096
    with pytest.raises(ValueError, match="too much"):
        chat.variables_of({"messages": HI * 10_000, **wide}, {"bos_token"})
    assert "bos_token" not in chat.variables_of({"messages": HI * 10_000, **wide}, {"eos_token"})


def test_the_variables_of_a_template_are_those_it_looks_at():
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}{{ width }}"
    )
    assert chat.names_in(template) == {"messages", "width"}
    assert chat.names_in("{% no template") == frozenset()
