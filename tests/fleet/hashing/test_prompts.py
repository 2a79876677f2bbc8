"""Prompts to hashes: incremental and from scratch give the same, within a memory budget."""

import random

import pytest

from impala_vllm.fleet.hashing.prompts import MARK_EVERY_TOKENS, Prompts
from impala_vllm.fleet.hashing.scheme import Adapter, Scheme
from impala_vllm.fleet.hashing.tokenizer import Tokenizer, TokenizerError

SCHEME = Scheme("sha256", b"seed", 16)
WORDS = [
    "read",
    "the",
    "file",
    "and",
    "run",
    "def x(y):",
    "return",
    "12",
    "+",
    "z\n\t",
    "naïve",
    "你好",
    "<tool_call>",
    "",
]


def words(seed: int, number: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=number))


def talk(num_turns: int, seed: int = 0) -> dict:
    messages = [{"role": "system", "content": words(seed, 2000)}]
    for turn in range(num_turns):
        messages += [
            {"role": "user", "content": words(100 + seed + turn, 60)},
            {"role": "assistant", "content": words(200 + seed + turn, 40)},
        ]
    return {"messages": [*messages, {"role": "user", "content": "go on"}]}


def whole(tokenizer, body, salt=None, adapter=None) -> tuple[list[int], int]:
    """Straight from text to tokens to hashes."""
    text = tokenizer.render(body["messages"], None, {"add_generation_prompt": True})
    tokens = tokenizer.encode(text)
    return SCHEME.chain(tokens, salt=salt, adapter=adapter).keys, len(tokens)


def test_turns_of_a_chat_cost_what_is_new_and_hash_as_from_scratch(tokenizer):
    prompts = Prompts(SCHEME, tokenizer)
    known = []
    for num_turns in range(8):
        body = talk(num_turns)
        found = prompts.of_chat(body)
        keys, num_tokens = whole(tokenizer, body)
        assert list(found.keys) == keys
        assert found.num_tokens == num_tokens
        known.append(found.num_known_tokens / num_tokens)
    assert known[0] == 0
    assert min(known[2:]) > 0.9


def test_another_trace_goes_on_from_the_shared_opening(tokenizer):
    prompts = Prompts(SCHEME, tokenizer)
    prompts.of_chat(talk(3))
    other = talk(2)
    other["messages"][1]["content"] = "something else altogether"
    opening = len(tokenizer.encode(other["messages"][0]["content"]))
    found = prompts.of_chat(other)
    assert opening - MARK_EVERY_TOKENS - 100 <= found.num_known_tokens <= opening + 20
    assert found.num_known_tokens > opening / 2
    assert list(found.keys) == whole(tokenizer, other)[0]


def test_salts_and_adapters_share_nothing_not_even_what_is_remembered(tokenizer):
    prompts = Prompts(SCHEME, tokenizer)
    body = talk(3)
    plain = prompts.of_chat(body)
    salted = prompts.of_chat({**body, "cache_salt": "a"})
    adapted = prompts.of_chat(body, Adapter("sql", "/sql"))
    assert salted.num_known_tokens == adapted.num_known_tokens == 0
    assert list(salted.keys) == whole(tokenizer, body, salt="a")[0]
    assert list(adapted.keys) == whole(tokenizer, body, adapter=Adapter("sql", "/sql"))[0]
    assert not set(plain.keys) & (set(salted.keys) | set(adapted.keys))


def test_memory_is_bounded_and_answers_stay_right(tokenizer):
    prompts = Prompts(SCHEME, tokenizer, memory_bytes=60_000)
    for seed in range(20):
        body = talk(2, seed * 1000)
        assert list(prompts.of_chat(body).keys) == whole(tokenizer, body)[0]
        assert prompts._bytes <= 60_000
    assert prompts.of_chat(talk(2, 19_000)).num_known_tokens > 1000
    assert prompts.of_chat(talk(2, 0)).num_known_tokens < 1000
    tiny = Prompts(SCHEME, tokenizer, memory_bytes=0)
    tiny.of_chat(talk(1))
    assert (tiny._bytes, len(tiny._marks), len(tiny._num_marks_of)) == (0, 0, 0)


def test_completions_as_text_and_as_tokens(tokenizer):
    prompts = Prompts(SCHEME, tokenizer)
    text = "<|im_start|>user\n" + words(1, 200)
    tokens = tokenizer.encode(text)
    assert list(prompts.of_completion({"prompt": text}).keys) == SCHEME.chain(tokens).keys
    assert list(prompts.of_completion({"prompt": tokens}).keys) == SCHEME.chain(tokens).keys
    for several in ([text, text], [tokens, tokens], None, []):
        assert prompts.of_completion({"prompt": several}) is None


def test_tokens_of_a_next_turn_are_hashed_from_where_it_departs(tokenizer):
    prompts = Prompts(SCHEME, tokenizer)
    tokens = [number * 7919 % 50_000 for number in range(10 * MARK_EVERY_TOKENS + 77)]
    assert prompts.of_completion({"prompt": tokens}).num_known_tokens == 0
    longer = [*tokens, *range(500)]
    found = prompts.of_completion({"prompt": longer})
    assert (found.num_known_tokens, found.num_tokens) == (10 * MARK_EVERY_TOKENS, len(longer))
    assert list(found.keys) == SCHEME.chain(longer).keys
    other = [*tokens[: 3 * MARK_EVERY_TOKENS + 5], *tokens[::-1]]
    found = prompts.of_completion({"prompt": other})
    assert found.num_known_tokens == 3 * MARK_EVERY_TOKENS
    assert list(found.keys) == SCHEME.chain(other).keys
    assert prompts.of_completion({"prompt": longer, "cache_salt": "a"}).num_known_tokens == 0
    assert (
        list(prompts.of_completion({"prompt": longer, "cache_salt": "b"}).keys) == SCHEME.chain(longer, salt="b").keys
    )


@pytest.mark.parametrize("odd", [-1, 1 << 32, 1 << 70])
def test_what_is_no_token_is_left_to_the_engine(tokenizer, odd):
    assert Prompts(SCHEME, tokenizer).of_completion({"prompt": [1, odd]}) is None


def test_responses_are_chats_in_other_words(tokenizer):
    prompts = Prompts(SCHEME, tokenizer)
    asked = {"role": "user", "content": words(1, 100)}
    chat = prompts.of_chat({"messages": [{"role": "system", "content": "Be."}, asked]})
    assert list(prompts.of_response({"input": asked["content"], "instructions": "Be."}).keys) == list(chat.keys)
    assert list(prompts.of_response({"input": [asked], "instructions": "Be."}).keys) == list(chat.keys)
    assert prompts.of_response({"input": "x", "previous_response_id": "r"}) is None
    assert prompts.of_response({"input": [{"type": "function_call"}]}) is None
    tool = {"type": "function", "name": "run", "parameters": {"type": "object"}}
    with_tool = {"messages": [asked], "tools": [{"type": "function", "function": tool}]}
    told = prompts.of_response({"input": [asked], "tools": [tool, {"type": "web_search"}]})
    assert list(told.keys) == list(prompts.of_chat(with_tool).keys)
    assert told.num_tokens > prompts.of_response({"input": [asked]}).num_tokens


def test_a_chat_with_tools_has_the_template_for_tools(model_dir, tmp_path):
    several = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(model_dir)
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    parts = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}{{ mood }}"
    several.chat_template = {"default": plain, "tool_use": parts}
    several.save_pretrained(tmp_path)
    tokenizer = Tokenizer(str(tmp_path))
    prompts, asked = Prompts(SCHEME, tokenizer), words(1, 100)
    body = {"messages": [{"role": "user", "content": asked}], "chat_template_kwargs": {"mood": words(2, 50)}}
    tool = {"type": "function", "function": {"name": "run"}}
    for more, text in (({}, asked), ({"tools": [tool]}, f"[{asked}]{words(2, 50)}")):
        assert list(prompts.of_chat({**body, **more}).keys) == SCHEME.chain(tokenizer.encode(text)).keys


@pytest.mark.parametrize("own", [{"chat_template": "{{ 'x' * 10 }}"}, {"tokenize": True}, {"tools": []}, 7])
def test_a_chat_with_a_renderer_of_its_own_has_no_hashes(tokenizer, own):
    assert Prompts(SCHEME, tokenizer).of_chat({**talk(0), "chat_template_kwargs": own}) is None


def test_pieces_have_the_tokens_of_the_text(tokenizer):
    text = "".join(f"<|im_start|>{words(i, 30)}<tool_call>\n{{}}</tool_call><|im_end|>\n\n" for i in range(20))
    pieces = tokenizer.pieces(text)
    assert "".join(pieces) == text
    assert len(pieces) > 100
    assert [token for piece in pieces for token in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(TokenizerError, match="give --tokenizer a directory"):
        Tokenizer(str(tmp_path))
