"""Which replica serves a turn: a session stays where it began, a new one begins where least is going on."""

from collections.abc import Sequence

from impala_vllm.sim.replica import Replica
from impala_vllm.sim.request import Request


class Sticky:
    """Affinity by session id, as gateways do it by a header; a child starts anew."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas
        self._home: dict[str, Replica] = {}
        self._num_at = dict.fromkeys(replicas, 0)

    def send(self, request: Request) -> None:
        name = request.session.session_id
        home = self._home.get(name)
        if home is None:
            home = min(self._replicas, key=lambda r: self._num_at[r])
            self._home[name] = home
            self._num_at[home] += 1
        if request.index == len(request.session.turns) - 1:  # it will not ask for a place again
            self._num_at[home] -= 1
            del self._home[name]
        home.arrive(request)
