"""The waiting requests that were judged, in order of rank: three lists in step, changed in place.

A step moves a handful of a long queue, so nothing is sorted or copied.
"""

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from impala_vllm.core import rank

if TYPE_CHECKING:
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
        self._key_of: dict[Request, Key] = {}

    def __len__(self) -> int:
        return len(self.requests)

    def put(self, request: "Request", key: "Key", ask: "Asking") -> None:
        """Place the request, wherever it stood before."""
        self.discard(request)
        self._key_of[request] = key
        index = bisect_right(self._keys, key)
        self._keys.insert(index, key)
        self.requests.insert(index, request)
        self.asks.insert(index, ask)

    def discard(self, request: "Request") -> None:
        """The request stands nowhere any more. No-op where it did not."""
        key = self._key_of.pop(request, None)
        if key is None:
            return
        index = bisect_left(self._keys, key)
        while self.requests[index] is not request:
            index += 1
        del self._keys[index], self.requests[index], self.asks[index]

    def passed_by(self, request: "Request") -> "tuple[list[Request], list[Asking]]":
        """`requests` and `asks` with the request behind all others; preempted and late ones are never passed."""
        key = self._key_of.get(request)
        if key is None or key[0] != rank.IN_TIME:
            return self.requests, self.asks
        at = self.requests.index(request)
        requests, asks = self.requests.copy(), self.asks.copy()
        requests.append(requests.pop(at))
        asks.append(asks.pop(at))
        return requests, asks
