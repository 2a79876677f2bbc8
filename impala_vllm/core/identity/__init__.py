"""Whose turn is this: traces recognised from prefix hashes, cadence and shape."""

from impala_vllm.core.identity.config import IdentityConfig
from impala_vllm.core.identity.identity import Identity

__all__ = ["Identity", "IdentityConfig"]
