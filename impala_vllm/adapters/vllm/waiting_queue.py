"""vLLM's waiting queue, of which `schedule()` sees only what is admitted, in the order of rank.

`schedule()` asks `if not queue`, peeks and pops: those see the plan of this step. Counts and iteration see
every request, held ones included. One writer: the engine loop's thread.
"""

from collections import deque
from collections.abc import Iterable, Iterator, KeysView

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

MAX_STUCK = 64
"""So many that find no room are passed by all others; then they are tried again."""


class WaitingQueue(RequestQueue):
    """Every waiting request in order of arrival, and the admitted ones in order of rank."""

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        self._requests: dict[Request, None] = dict.fromkeys(requests)
        self._added: dict[Request, None] = dict(self._requests)
        self._gone: dict[Request, None] = {}
        self._admitted: deque[Request] = deque()
        self._tried: Request | None = None
        self._stuck: dict[Request, None] = {}

    def admit(self, requests: Iterable[Request]) -> None:
        """The plan of the coming step, best first. Replaces the one before."""
        self._admitted = deque(requests)
        self._tried = None

    def stepped(self, is_anew: bool, is_throttled: bool = False) -> None:
        """A step has looked at the plan. `is_anew`: it placed somebody, or there is more room than before, so whoever
        found none may be tried again. A throttled one places no prefill, whoever it is of."""
        if is_anew:
            self._stuck.clear()
        if self._tried is not None and not is_throttled:
            self._stuck.pop(self._tried, None)
            self._stuck[self._tried] = None
            if len(self._stuck) > MAX_STUCK:
                self._stuck.clear()

    def left_over(self) -> list[Request]:
        """Who was looked at of late and could not be placed, last tried last.

        A step looks at no more than one of them; at none where no seat or token is left.
        """
        return [request for request in self._stuck if request in self._requests]

    def take_added(self) -> list[Request]:
        """Who was queued, or queued again, since the last call and is still here; in that order."""
        added = [request for request in self._added if request in self._requests]
        self._added.clear()
        return added

    def take_gone(self) -> list[Request]:
        """Who left since the last call, whether or not it is back."""
        gone = list(self._gone)
        self._gone.clear()
        return gone

    def add_request(self, request: Request) -> None:
        self._requests[request] = self._added[request] = None

    def prepend_request(self, request: Request) -> None:
        """Rank decides who is first, so this adds."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.add_request(request)

    def pop_request(self) -> Request:
        request = self.peek_request()
        self._admitted.popleft()
        self.remove_request(request)
        self._tried = None
        return request

    def peek_request(self) -> Request:
        self._drop_gone()
        if not self._admitted:
            raise IndexError("peek from a queue with nothing admitted")
        self._tried = self._admitted[0]
        return self._tried

    def remove_request(self, request: Request) -> None:
        del self._requests[request]
        self._gone[request] = None

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request in self._requests:
                self.remove_request(request)

    def __bool__(self) -> bool:
        self._drop_gone()
        return bool(self._admitted)

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def members(self) -> KeysView[Request]:
        """Every request, to ask for membership without a call for each."""
        return self._requests.keys()

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests))

    def _drop_gone(self) -> None:
        while self._admitted and self._admitted[0] not in self._requests:
            self._admitted.popleft()
