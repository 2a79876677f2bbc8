"""Breaks parts of impala in every process that has this folder on its path.

Identity raises for one session id. Where IMPALA_DISK_ORDERS is set, `disk_orders` breaks the NVMe tier as well.
"""

import os

from impala_vllm.core.identity import Identity

_arrive = Identity.arrive


def _arrive_or_raise(self, arrival, now):
    if arrival.session_id == "raise an error":
        raise RuntimeError("sabotage")
    return _arrive(self, arrival, now)


Identity.arrive = _arrive_or_raise

if "IMPALA_DISK_ORDERS" in os.environ:
    import disk_orders  # noqa: F401
