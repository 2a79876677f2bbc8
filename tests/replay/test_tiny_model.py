"""The tiny model's files, tokenizer and chat template."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from impala_vllm.replay import tiny_model

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOOLS = [{"type": "function", "function": {"name": "Bash", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build("1m", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory)


def prompt(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    return tokenizer(text).input_ids


def test_a_second_call_builds_nothing(directory: Path):
    stamp = (directory / "model.safetensors").stat().st_mtime_ns
    assert tiny_model.build("1m", cache_dir=directory.parent.parent) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == stamp


def test_builders_that_race_share_one_complete_model(tmp_path: Path):
    with ThreadPoolExecutor(2) as pool:
        built = list(pool.map(lambda _: tiny_model.build("1m", cache_dir=tmp_path), range(2)))
    assert built[0] == built[1]
    assert [p.name for p in (tmp_path / "models").iterdir()] == [built[0].name]


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_other_weights(directory: Path, tmp_path: Path):
    again = tiny_model.build("1m", cache_dir=tmp_path)
    other = tiny_model.build("1m", seed=1, cache_dir=tmp_path)
    assert again.name == directory.name != other.name
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (directory / name).read_bytes()
    assert (other / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert (other / "model.safetensors").read_bytes() != (directory / "model.safetensors").read_bytes()


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(tiny_model.TinyModelError, match="choose one of 1m, 5m, 8m, 26m"):
        tiny_model.build("7b")


@pytest.mark.parametrize("size", tiny_model.SIZES)
def test_a_size_is_named_by_its_parameters(size: str):
    shape = tiny_model.SIZES[size]
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    layer = attention + 3 * shape.hidden * shape.intermediate
    parameters = 2 * tiny_model.VOCABULARY_SIZE * shape.hidden + shape.layers * layer
    assert parameters == pytest.approx(int(size[:-1]) * 1e6, rel=0.45 if size == "1m" else 0.1)


def test_every_text_survives_the_tokenizer(tokenizer: Any):
    text = "Grüße, 東京 🙂\n\n\tif x:\n        return  x\r\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == tiny_model.VOCABULARY_SIZE


def test_marks_are_single_tokens_and_only_turn_marks_are_hidden(tokenizer: Any):
    for mark in (tiny_model.TURN_START, tiny_model.TURN_END, tiny_model.TOOL_CALL_START, tiny_model.TOOL_CALL_END):
        assert len(tokenizer(mark).input_ids) == 1
    shown = tokenizer.decode(tokenizer("<|im_start|>a<tool_call>b<|im_end|>").input_ids, skip_special_tokens=True)
    assert shown == "a<tool_call>b"


CALL = '<tool_call>\n{"name": "Bash", "arguments": {"command": "ls -la", "timeout_s": 3}}\n</tool_call>'


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("Done.", {"content": "Done."}),
        ("\n  indented", {"content": "\n  indented"}),
        (f"Let me look.\n{CALL}", {"content": "Let me look.\n", "calls": 1}),
        (f"{CALL}\n{CALL}", {"content": None, "calls": 2}),
    ],
)
def test_a_turns_prompt_and_answer_begin_the_next_prompt(tokenizer: Any, output: str, message: dict[str, Any]):
    history: list[dict[str, Any]] = [
        {"role": "system", "content": "You are careful."},
        {"role": "user", "content": "What is here?"},
    ]
    before = prompt(tokenizer, history, tools=TOOLS) + tokenizer(output + tiny_model.TURN_END).input_ids
    arguments = {"command": "ls -la", "timeout_s": 3}
    call = {"id": "c1", "type": "function", "function": {"name": "Bash", "arguments": arguments}}
    answer: dict[str, Any] = {"role": "assistant", "content": message["content"]}
    if message.get("calls"):
        answer["tool_calls"] = [call] * message["calls"]
    history += [answer, {"role": "tool", "tool_call_id": "c1", "content": "a.py\nb.py"}]
    after = prompt(tokenizer, history, tools=TOOLS)
    assert after[: len(before)] == before


def test_arguments_may_be_the_text_that_clients_send(tokenizer: Any):
    call = {"function": {"name": "Bash", "arguments": json.dumps({"command": "ls"})}}
    text = tokenizer.apply_chat_template([{"role": "assistant", "content": "", "tool_calls": [call]}], tokenize=False)
    assert '{"name": "Bash", "arguments": {"command": "ls"}}' in text


def test_the_answer_depends_on_a_block_in_the_middle_of_the_prompt(directory: Path):
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.arange(400).remainder(97).add(300).unsqueeze(0)
    other = ids.clone()
    other[0, 96:128] += 1000
    with torch.no_grad():
        first, second = model(ids).logits[0, -1], model(other).logits[0, -1]
    assert (first - second).abs().max() > 0.1 * first.std()


def test_hermes_finds_the_tool_calls_in_an_answer(tokenizer: Any):
    pytest.importorskip("vllm")
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

    request = ChatCompletionRequest.model_validate({"model": "m", "messages": [], "tools": TOOLS})
    found = Hermes2ProToolParser(tokenizer).extract_tool_calls(f"Let me look.\n{CALL}", request)
    assert found.content == "Let me look.\n"
    assert [(c.function.name, json.loads(c.function.arguments)["command"]) for c in found.tool_calls] == [
        ("Bash", "ls -la")
    ]
