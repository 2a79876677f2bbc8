"""What a simulated policy may decide, and what it decides where it does not care: stock vLLM.

A replica tells it the facts and asks it; a policy never changes a request, a block or the clock.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from impala_vllm.sim.eviction import Lru, Order
from impala_vllm.sim.loop import Loop
from impala_vllm.sim.tiers import Room, Tiers

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica
    from impala_vllm.sim.request import Request


class Policy:
    """First come, first served; least recently used goes first."""

    replan_s: float | None = None
    """Plans change with time alone: be asked again so often while somebody waits. None: only when something happens."""
    reorder_s: float | None = None
    """The same of the order of what runs, while somebody in it gets no tokens."""

    def __init__(self, replica: "Replica") -> None:
        """Called before the replica has a pool; `idle` must be there afterwards."""
        self.replica = replica
        self.idle: Order = Lru()
        self.held: Iterable[Request] = ()
        """Who waits and is in no plan: policy keeps them back."""

    def tiers(self, loop: Loop, room: Room) -> Tiers:
        """How what lies below HBM is used. Called once, where there is anything."""
        return Tiers(loop, room)

    def arrive(self, request: "Request", now: float) -> None:
        """`request` is about to wait."""

    def placed(self, request: "Request", now: float) -> None:
        """`request` waits no longer: it has blocks and runs."""

    def preempted(self, request: "Request", now: float) -> None:
        """`request` has lost its place and waits again."""

    def finish(self, request: "Request", now: float) -> None:
        """`request` has its last token and its blocks are idle."""

    def owner(self, request: "Request") -> tuple[str | None, int]:
        """Whose the blocks are that the request is about to give back, and how many leading ones others share."""
        return None, 0

    def gives_way(self, now: float) -> Iterable["Request"]:
        """Running requests that lose their place before anybody is placed in this step."""
        return ()

    def plan(self, now: float) -> Iterable["Request"]:
        """Who may be placed this step, in the order to try. Says in `held` who may not."""
        return [*reversed(self.replica.preempted), *self.replica.waiting]

    def order_running(self) -> None:
        """Sort what runs: earlier ones get the step's tokens first."""

    def num_after_placed(self, now: float) -> int:
        """How many of the last in `running` get tokens only after those who are placed in this step."""
        return 0

    def victim(self, left: Sequence["Request"]) -> "Request":
        """Which running request loses its place when HBM is out: of those the step has given no tokens yet."""
        return left[-1]

    def stepped(self, step_s: float, prefill: int, context: float, count: int) -> None:
        """`count` steps of this length are done, each with `prefill` prompt tokens, `context` tokens before them."""
