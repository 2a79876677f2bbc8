"""The tokens of a request's prompt, all of them, as vLLM's routes for rendering and tokenising answer them."""

from collections.abc import Mapping
from typing import Any

from impala_vllm.fleet.hashing import Tokenizer, TokenizerError, chat


def tokens_of(tokenizer: Tokenizer, body: Mapping[str, Any]) -> list[int] | None:
    """Of a chat or a completion's prompt; None where it is not text. Blocking: call it in a worker thread."""
    if "messages" not in body:
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            return prompt
        return [*tokenizer.leading, *tokenizer.encode(prompt), *tokenizer.trailing]
    messages = chat.messages_of(body, tokenizer.template)
    if messages is None:
        return None
    try:
        text = tokenizer.render(messages, chat.tools_of(body), chat.variables_of(body, tokenizer.variables))
    except (TokenizerError, ValueError):
        return None
    return [token for piece in tokenizer.pieces(text) for token in tokenizer.encode(piece)]
