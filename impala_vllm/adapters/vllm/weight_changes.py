"""Notices that a client changes the weights of a running engine, so that no tier keeps KV of the old ones.

vLLM leaves that to the client, who may or may not reset the prefix cache. HBM forgets by itself before long; host keeps
for hours, and a slab would be found again by a server that loads the old weights from disk.
"""

import functools
from collections.abc import Callable
from typing import Any

_MARK = "watched_by_impala"
_LOOK_ONLY = ("compute_", "get_", "init_", "shutdown_", "save_", "check_")


def changes_weights(method: Any) -> bool:
    """Does a worker's method of this name, vLLM's or an extension's, change weights? What has no name says nothing."""
    name = method if isinstance(method, str) else getattr(method, "__name__", "")
    return ("weight" in name or "named_param" in name) and not name.startswith(_LOOK_ONLY)


def install_watch() -> None:
    """Have the scheduler's `weights_changed` called after each such call to the workers. Idempotent."""
    from vllm.v1.engine.core import EngineCore

    cls: Any = EngineCore
    if not hasattr(cls.collective_rpc, _MARK):
        cls.collective_rpc = _watched(cls.collective_rpc)


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, method, *args, **kwargs)
        finally:  # one that failed may have changed some
            weights_changed = getattr(getattr(self, "scheduler", None), "weights_changed", None)
            if weights_changed is not None and changes_weights(method):
                weights_changed()

    setattr(collective_rpc, _MARK, True)
    return collective_rpc
