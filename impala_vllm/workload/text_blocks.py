"""Blocks for logs that hold text and no token ids: chained hashes of fixed runs of bytes.

Without the model's tokenizer a block is 64 bytes of UTF-8: English and code run at about four bytes a
token, so that is a block of 16 tokens. What counts for identity is where two prompts part, and the
first byte that differs ends the shared blocks exactly as the first token that differs would.
"""

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

BYTES_A_TOKEN = 4
BLOCK_TOKENS = 16


def num_tokens(text: bytes) -> int:
    """About how many tokens the text is."""
    return -(-len(text) // BYTES_A_TOKEN)


def block_ids(text: bytes, block_tokens: int = BLOCK_TOKENS) -> tuple[int, ...]:
    """Chained 64-bit ids of the full blocks. O(len(text))."""
    size = block_tokens * BYTES_A_TOKEN
    ids: list[int] = []
    parent = b""
    for start in range(0, len(text) - size + 1, size):
        parent = blake2b(text[start : start + size], digest_size=8, key=parent).digest()
        ids.append(int.from_bytes(parent, "little"))
    return tuple(ids)


def render(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, response_format: Any = None
) -> bytes:
    """A chat as one text: tools, answer format, then each message; history stays a prefix of what follows."""
    parts: list[str] = []
    if tools:
        parts.append("tools\n" + _plain(tools))
    if response_format:
        parts.append("response_format\n" + _plain(response_format))
    parts += [_message(message) for message in messages]
    return "\x1e".join([*parts, ""]).encode(errors="surrogatepass")


def _message(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    text = content if isinstance(content, str) else _plain(content)
    rest = {k: v for k, v in message.items() if k not in ("role", "content") and v is not None}
    return f"{message.get('role', '')}\n{text}" + (f"\n{_plain(rest)}" if rest else "")


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
