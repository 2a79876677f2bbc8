"""Makes identity raise for one session id, in every process that has this folder on its path."""

from impala_vllm.core.identity import Identity

_arrive = Identity.arrive


def _arrive_or_raise(self, arrival, now):
    if arrival.session_id == "raise an error":
        raise RuntimeError("sabotage")
    return _arrive(self, arrival, now)


Identity.arrive = _arrive_or_raise
