"""The router's own copy of what the engine does to a prompt before it looks for its prefix."""

from impala_vllm.fleet.hashing.handshake import Hello, HelloError
from impala_vllm.fleet.hashing.prompts import Prompt, Prompts
from impala_vllm.fleet.hashing.scheme import Adapter, Scheme, SchemeError
from impala_vllm.fleet.hashing.tokenizer import Tokenizer, TokenizerError

__all__ = [
    "Adapter",
    "Hello",
    "HelloError",
    "Prompt",
    "Prompts",
    "Scheme",
    "SchemeError",
    "Tokenizer",
    "TokenizerError",
]
