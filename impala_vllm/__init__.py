"""impala-vllm: the trace (one agent run) as the unit of work of a vLLM server.

Importing this package is cheap and imports neither torch nor vLLM.
`impala_vllm.Scheduler` is resolved on first use, because only a vLLM process can use it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from impala_vllm.adapters.vllm.scheduler import Scheduler

__all__ = ["Scheduler", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Scheduler":
        from impala_vllm.adapters.vllm.scheduler import Scheduler

        return Scheduler
    raise AttributeError(f"module 'impala_vllm' has no attribute {name!r}")
