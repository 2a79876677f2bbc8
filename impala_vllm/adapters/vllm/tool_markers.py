"""The token ids that open a tool call, read once from the tokenizer's files.

The engine process has no tokenizer and must not detokenise; a marker that is one token of its own
can be found in the output by its id. None found: a turn's end says only that it stopped.
"""

import json
from pathlib import Path
from typing import Any

MARKERS = frozenset(
    {
        "<tool_call>",  # Hermes, Qwen
        "<tool_calls>",
        "<|tool_call|>",  # Granite, Phi
        "<|tool_call_begin|>",  # Kimi
        "<|tool_calls_section_begin|>",
        "<\uff5ctool\u2581calls\u2581begin\uff5c>",  # DeepSeek
        "<\uff5ctool\u2581call\u2581begin\uff5c>",
        "[TOOL_CALLS]",  # Mistral
        "<|python_tag|>",  # Llama
        "<function_call>",
        "<minimax:tool_call>",
        "<|call|>",  # gpt-oss
    }
)


def read(tokenizer: str) -> frozenset[int]:
    """Ids of the markers this tokenizer (a directory or a hub name already fetched) has as single tokens."""
    for name, added in (("tokenizer_config.json", _from_config), ("tokenizer.json", _from_tokenizer)):
        file = _find(tokenizer, name)
        if file is None:
            continue
        try:
            ids = frozenset(i for i, text in added(json.loads(file.read_text(encoding="utf-8"))) if text in MARKERS)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if ids:
            return ids
    return frozenset()


def _from_config(data: dict[str, Any]) -> list[tuple[int, str]]:
    return [(int(i), token["content"]) for i, token in data.get("added_tokens_decoder", {}).items()]


def _from_tokenizer(data: dict[str, Any]) -> list[tuple[int, str]]:
    return [(token["id"], token["content"]) for token in data.get("added_tokens", [])]


def _find(tokenizer: str, name: str) -> Path | None:
    local = Path(tokenizer) / name
    if local.is_file():
        return local
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(tokenizer, name)
    except Exception:  # not a hub name, or no hub library: there is nothing to read
        return None
    return Path(cached) if isinstance(cached, str) else None
