"""The waiting requests that were judged, in order of rank: three lists in step, changed in place.

A step moves a handful of a long queue, so nothing is sorted or copied.
"""

import sys
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from impala_vllm.core import rank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.request import Request

    from impala_vllm.core.admission import Asking
    from impala_vllm.core.rank import Key


_IN_TIME: "Key" = (rank.IN_TIME, -sys.maxsize, 0.0, 0.0)


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
        """Who is neither preempted nor past its bound, best first."""
        first = bisect_left(self._keys, _IN_TIME)
        return zip(self.requests[first:], self.asks[first:], strict=True)

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

    def passed_by(self, request: "Request") -> "tuple[list[Request], list[Asking]]":
        """`requests` and `asks` with the request behind all others; preempted and late ones are never passed."""
        entry = self._entry_of.get(request)
        if entry is None or entry[0][0] != rank.IN_TIME:
            return self.requests, self.asks
        at = self.requests.index(request)
        requests, asks = self.requests.copy(), self.asks.copy()
        requests.append(requests.pop(at))
        asks.append(asks.pop(at))
        return requests, asks
