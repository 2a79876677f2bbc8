"""Ids by meaning, from the files of a model."""

import json
from pathlib import Path

import pytest

from impala_vllm.replay.vocabulary import ModelError, Vocabulary


def model(directory: Path, eos: object, added: dict[int, str], size: int = 100) -> Path:
    (directory / "config.json").write_text(json.dumps({"vocab_size": size, "eos_token_id": eos}))
    tokens = [{"id": i, "content": text} for i, text in added.items()]
    vocab = {f"t{i}": i for i in range(size)}
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {"vocab": vocab}}))
    return directory


def test_plain_ids_are_the_longest_run_without_special_ones(tmp_path: Path) -> None:
    found = Vocabulary.of_model(model(tmp_path, [7], {0: "<pad>", 7: "<end>", 90: "<tool_call>"}))
    assert found == Vocabulary(first_plain=8, last_plain=89, eos=7, tool_call=90)


def test_texts_depend_on_their_key_and_extend_each_other(vocabulary: Vocabulary) -> None:
    assert vocabulary.text("a", 50)[:20] == vocabulary.text("a", 20)
    assert vocabulary.text("a", 20) != vocabulary.text("b", 20)
    assert all(10 <= i <= 4000 for i in vocabulary.text("a", 500))


def test_a_directory_that_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json: cannot read it .*give a complete model directory"):
        Vocabulary.of_model(tmp_path)
