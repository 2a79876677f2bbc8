"""Benchmarks only: one engine that serves some runs with impala's hooks and others as stock vLLM.

Two engines of the same build were seen to differ by several percent, so what costs less than that is measured within
one. A run whose requests have a cache salt that ends with `STOCK` is served by vLLM's own methods on vLLM's own queues.
Loaded with `--scheduler-cls impala_vllm.adapters.vllm.switched.Scheduler`; it
switches when the first request comes to an engine that has none.
"""

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler as SyncScheduler

from impala_vllm.adapters.vllm import scheduler
from impala_vllm.adapters.vllm.enforcer import Enforcer

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

logger = init_logger("vllm.impala")

STOCK = "-stock"


class Scheduler:
    """Builds impala's scheduler for a finished configuration, with the switch."""

    def __new__(cls, vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> Any:
        made = scheduler.Scheduler(vllm_config, *args, **kwargs)
        if getattr(made, "enforcer", None) is None:
            raise ValueError("the switched scheduler compares policy with stock: it needs mode enforce")
        made.switch = Switch(made)
        made.__class__ = _switched(type(made))
        return made


class Switch:
    """Which of the two serves now, and the change from one to the other, while the engine is empty."""

    def __init__(self, made: Any) -> None:
        self._scheduler = made
        self._policy: Enforcer = made.enforcer
        self.is_stock = False

    def turn(self, first: "Request") -> None:
        """`first` comes to an empty engine: serve it and what comes with it as its salt says."""
        is_stock = (first.cache_salt or "").endswith(STOCK)
        if is_stock == self.is_stock:
            return
        self.is_stock = is_stock
        pool, free = self._scheduler.kv_cache_manager.block_pool, self._policy.free
        if is_stock:
            self._policy.retire()
            if free is not None:
                pool.free_block_queue = FreeKVCacheBlockQueue(free.get_all_free_blocks())
        else:
            if free is not None:
                free.take_over(pool.free_block_queue)
                pool.free_block_queue = free
            self._scheduler.waiting = self._policy.gate.waiting
        logger.info("impala: the runs that follow are served by %s", "stock vLLM" if is_stock else "impala")


def _switched(ours: type[SyncScheduler]) -> type:
    """`ours`, but each verb of vLLM's that it changes is vLLM's own while the switch says so."""
    stock = AsyncScheduler if issubclass(ours, AsyncScheduler) else SyncScheduler

    def verb(name: str) -> Any:
        with_hooks, without = getattr(ours, name), getattr(stock, name)

        def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "add_request" and not self.requests:
                self.switch.turn(args[0])
            return (without if self.switch.is_stock else with_hooks)(self, *args, **kwargs)

        return chosen

    hooks = (name for layer in ours.__mro__ if layer.__module__ == scheduler.__name__ for name in vars(layer))
    changed = {name for name in hooks if not name.startswith("__") and callable(getattr(stock, name, None))}
    return type("Switched", (ours,), {name: verb(name) for name in changed})
