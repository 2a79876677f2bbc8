"""The waiting requests that were judged, in order of rank: three lists in step, changed in place.

A step moves a handful of a long queue, so nothing is sorted or copied.
"""

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from impala_vllm.core import rank

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vllm.v1.request import Request

    from impala_vllm.core.admission import Asking
    from impala_vllm.core.rank import Key


class RankOrder:
    """Who stands where. O(log n) comparisons for a change; equal keys stand in the order in which they were put."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        """Best first. Not to be changed by readers, like `asks`; good until the next change."""
        self.asks: list[Asking] = []
        """What each of `requests` asks for."""
        self._keys: list[Key] = []
        self._entry_of: dict[Request, tuple[Key, Asking]] = {}

    def __len__(self) -> int:
        return len(self.requests)

    def __contains__(self, request: object) -> bool:
        return request in self._entry_of

    def ask(self, request: "Request") -> "Asking":
        """What the request was last found to ask for."""
        return self._entry_of[request][1]

    def in_time(self) -> "Iterator[tuple[Request, Asking]]":
        """Who is neither preempted nor past its bound, best first. O(n)."""
        entries = zip(self._keys, self.requests, self.asks, strict=True)
        return ((request, ask) for key, request, ask in entries if key[1] == rank.IN_TIME)

    def put(self, request: "Request", key: "Key", ask: "Asking") -> None:
        """Place the request, wherever it stood before."""
        self.discard(request)
        self._entry_of[request] = key, ask
        index = bisect_right(self._keys, key)
        self._keys.insert(index, key)
        self.requests.insert(index, request)
        self.asks.insert(index, ask)

    def discard(self, request: "Request") -> None:
        """The request stands nowhere any more. No-op where it did not."""
        entry = self._entry_of.pop(request, None)
        if entry is None:
            return
        index = bisect_left(self._keys, entry[0])
        while self.requests[index] is not request:
            index += 1
        del self._keys[index], self.requests[index], self.asks[index]

    def passed_by(self, stuck: "Iterable[Request]") -> "tuple[list[Request], list[Asking]]":
        """`requests` and `asks` with these behind all others of their priority, in the order given; preempted and late
        ones are never passed."""
        requests, asks = self.requests, self.asks
        for request in stuck:
            key, ask = self._entry_of.get(request, (None, None))
            if key is None or ask is None or key[1] != rank.IN_TIME:
                continue
            if requests is self.requests:
                requests, asks = requests.copy(), asks.copy()
            at, end = requests.index(request), bisect_left(self._keys, (key[0], rank.PASSED_BY, 0.0, 0.0))
            requests.insert(end - 1, requests.pop(at))
            asks.insert(end - 1, asks.pop(at))
        return requests, asks
