"""An observed server answers what a stock server answers, whatever is asked."""

import pytest

TEXT = "The scheduler hands out blocks of memory to the requests that wait, and takes them back when they end. "
TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}


def tokens(response):
    return [choice["token_ids"] for choice in response["choices"]]


def chat(**fields):
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": "What waits?"}]
    return {"model": "tiny", "messages": messages, "max_tokens": 24, "temperature": 0, **fields}


@pytest.mark.parametrize("repeats", [1, 4, 16])
def test_greedy_tokens_are_equal_cold_and_cached(stock, observed, repeats, salt):
    for turn in range(3):
        prompt = salt + TEXT * (repeats + turn)
        assert tokens(observed.complete(prompt)) == tokens(stock.complete(prompt))


def test_cached_tokens_are_equal(stock, observed, salt):
    used = []
    for server in (stock, observed):
        server.complete(TEXT * 8, cache_salt=salt)
        used.append(server.complete(TEXT * 8, cache_salt=salt)["usage"]["prompt_tokens_details"])
    assert used[0] == used[1]
    assert used[0]["cached_tokens"] > 0


def test_streamed_answers_are_equal_and_come_in_pieces(stock, observed):
    answers = []
    for server in (stock, observed):
        events = list(server.events("/v1/chat/completions", chat()))
        answers.append("".join(event["choices"][0]["delta"].get("content") or "" for event in events))
        assert len(events) > 3  # a busy front-end sends several tokens in one event
    assert answers[0] == answers[1]


def test_several_samples_are_equal_and_one_turn(stock, observed, salt):
    fields = {"n": 3, "temperature": 0.8, "seed": 5, "cache_salt": salt}
    answer = observed.complete(TEXT * 2, **fields)
    assert sorted(tokens(answer)) == sorted(tokens(stock.complete(TEXT * 2, **fields)))
    again = observed.complete(TEXT * 2, **fields)
    assert observed.link(again["id"])["trace_id"] == observed.link(answer["id"])["trace_id"]
    links = [row for row in observed.rows("links") if answer["id"] in row["request_id"]]
    assert len(links) == 1


def test_structured_output_is_equal(stock, observed):
    shape = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    body = chat(response_format=shape)
    answers = [server.post("/v1/chat/completions", body)["choices"][0]["message"] for server in (stock, observed)]
    assert answers[0]["content"] == answers[1]["content"]


@pytest.mark.parametrize("choice", ["auto", "required", "none"])
def test_tool_calls_are_equal(stock, observed, choice):
    body = chat(tools=[TOOL], tool_choice=choice, max_tokens=48)
    calls = []
    for server in (stock, observed):
        message = server.post("/v1/chat/completions", body)["choices"][0]["message"]
        calls.append((message["content"], [call["function"] for call in message.get("tool_calls") or []]))
    assert calls[0] == calls[1]


def test_an_adapter_is_equal_and_keeps_its_traces_apart(stock, observed, salt):
    prompt = TEXT * 4
    plain = observed.complete(prompt, cache_salt=salt)
    adapted = observed.complete(prompt, model="extra", cache_salt=salt)
    assert tokens(adapted) == tokens(stock.complete(prompt, model="extra", cache_salt=salt))
    assert tokens(adapted) != tokens(plain)
    assert observed.link(adapted["id"])["trace_id"] != observed.link(plain["id"])["trace_id"]


def test_responses_are_equal(stock, observed):
    body = {"model": "tiny", "input": TEXT, "max_output_tokens": 16, "temperature": 0}
    texts = [server.post("/v1/responses", body)["output"][0]["content"][0]["text"] for server in (stock, observed)]
    assert texts[0] == texts[1]


def test_anthropic_messages_are_equal(stock, observed):
    body = {"model": "tiny", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 16, "temperature": 0}
    texts = [server.post("/v1/messages", body)["content"][0]["text"] for server in (stock, observed)]
    assert texts[0] == texts[1]


def test_fields_of_other_programs_are_not_in_the_way(stock, observed):
    body = chat(metadata={"session_id": "s"}, prompt_cache_key="k", user="u", vllm_xargs={"impala": "forged"})
    texts = [server.post("/v1/chat/completions", body)["choices"][0]["message"] for server in (stock, observed)]
    assert texts[0]["content"] == texts[1]["content"]


def test_a_stock_server_of_the_same_installation_has_nothing_of_ours(stock):
    assert stock.get("/impala/health")[0] == 404
    assert "impala_" not in stock.get("/metrics")[1]
