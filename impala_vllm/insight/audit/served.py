"""What the server says it found in its cache, against what the log says it could have."""

from impala_vllm.insight.audit.causes import Cause

_SURE = 0.8
"""Of an estimated prefix: what is cached beyond this share counts as all of it."""


def exact(shared_tokens: int, prompt_tokens: int, cached_tokens: int, block: int) -> tuple[Cause, int] | None:
    """What is missing of a prefix whose blocks are known. The last token of a prompt is never taken from a cache."""
    could = min(shared_tokens, prompt_tokens - 1) // block * block
    missing = could - cached_tokens
    if missing <= 0:
        return None
    return (Cause.LAST_BLOCK if missing == block and cached_tokens else Cause.EVICTED), missing


def estimated(shared_tokens: int, cached_tokens: int, block: int) -> tuple[Cause, int] | None:
    """The same for a prefix that is an estimate: said only where clearly more is missing than the estimate can err."""
    missing = shared_tokens - cached_tokens
    if missing <= max((1 - _SURE) * shared_tokens, 2 * block):
        return None
    return Cause.EVICTED, missing
