"""A log given to a recogniser as an engine would: arrivals and ends in order of time, no look-ahead."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from impala_vllm.core.identity.index import BrokenChain
from impala_vllm.core.types import Arrival, Finish, Link
from impala_vllm.workload.events import events
from impala_vllm.workload.source import WorkloadError
from impala_vllm.workload.turn import Turn


class Recogniser(Protocol):
    """What is told the facts and says whose turn it is."""

    def arrive(self, arrival: Arrival, now: float) -> Link:
        """The trace of a request, from what is known by now."""
        ...

    def finish(self, finish: Finish, now: float) -> None:
        """The request ended."""
        ...


def links(turns: Iterable[Turn], recogniser: Recogniser) -> Iterator[tuple[Turn, Link]]:
    """Every turn, sorted by arrival, with the answer it got. Raises WorkloadError where ids are no chain."""
    for event in events(turns):
        try:
            if isinstance(event.fact, Arrival):
                yield event.turn, recogniser.arrive(event.fact, event.now)
            else:
                recogniser.finish(event.fact, event.now)
        except BrokenChain as e:
            raise WorkloadError(
                f"{event.turn.recording}: request {event.turn.request_id}: {e}; write ids that stand for a block"
                " and all before it"
            ) from e
