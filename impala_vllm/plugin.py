"""The vLLM entry point: called in every vLLM process, possibly more than once.

Whatever goes wrong here, vLLM starts as if impala were not installed.
"""

import logging
import multiprocessing
import sys


def register() -> None:
    """Make impala selectable; change nothing that was not asked for. Idempotent."""
    in_child = multiprocessing.parent_process() is not None
    if in_child and "vllm.engine.arg_utils" not in sys.modules:
        return  # an engine or worker process: it is handed a finished configuration
    try:
        from impala_vllm.adapters.vllm.install import install

        install()
    except Exception as e:
        logging.getLogger("vllm.impala").warning(
            "impala is not selectable (%s: %s); see `impala doctor`", type(e).__name__, e
        )
