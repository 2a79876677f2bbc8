"""Tool-call markers from tokenizer files."""

import json

from impala_vllm.adapters.vllm import tool_markers


def test_markers_come_from_the_config_first(tmp_path):
    added = {"5": {"content": "<tool_call>"}, "6": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert tool_markers.read(str(tmp_path)) == {5}


def test_markers_come_from_the_tokenizer_where_the_config_has_none(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 3, "content": "[TOOL_CALLS]"}]}))
    assert tool_markers.read(str(tmp_path)) == {3}


def test_no_file_or_a_broken_one_means_no_marker(tmp_path):
    assert tool_markers.read(str(tmp_path / "nowhere")) == frozenset()
    (tmp_path / "tokenizer_config.json").write_text("[1")
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [7]}')
    assert tool_markers.read(str(tmp_path)) == frozenset()
