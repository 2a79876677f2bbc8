"""A way to choose a server that only this benchmark has; all others are `impala_vllm.sim.routers`."""

from collections.abc import Sequence

from impala_vllm.sim.routers import Ask, Machines, Peer


class StickyLeastLoaded(Peer):
    """A session's first turn goes where least is running, the others follow it; told the true id."""

    def __init__(self, machines: Machines) -> None:
        self._homes: dict[str, int] = {}

    def pick(self, ask: Ask, running: Sequence[int], now: float) -> int:
        if ask.session not in self._homes:
            self._homes[ask.session] = min(range(len(running)), key=running.__getitem__)
        return self._homes[ask.session]
