"""How many leading blocks of a chain others use too: what eviction by session must not take for one session's own."""

from impala_vllm.sim.request import Request


class Stems:
    """Remembers who asked for which block first. O(prompt) a turn."""

    def __init__(self) -> None:
        self._first: dict[int, str] = {}
        self._shared: set[int] = set()

    def arrive(self, request: Request) -> None:
        """Note the blocks of a turn."""
        name = request.session.session_id
        for key in request.keys:
            if self._first.setdefault(key, name) != name:
                self._shared.add(key)

    def depth(self, request: Request) -> int:
        """Leading blocks of the turn that another session used as well."""
        shared = self._shared
        return next((i for i, key in enumerate(request.keys) if key not in shared), len(request.keys))
