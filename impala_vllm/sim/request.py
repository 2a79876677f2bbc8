"""A turn on its way through a replica."""

from collections.abc import Callable

from impala_vllm.sim.sessions import Session, Turn


class Request:
    """Written by the replica that serves it; policies read."""

    __slots__ = (
        "arrived_s",
        "blocks",
        "cached_tokens",
        "first_s",
        "held_s",
        "held_since_s",
        "index",
        "is_preempted",
        "keys",
        "num_computed",
        "num_output",
        "num_preemptions",
        "num_tokens",
        "on_done",
        "on_first",
        "prompt_tokens",
        "request_id",
        "service_tokens",
        "session",
        "turn",
    )

    def __init__(
        self,
        session: Session,
        index: int,
        request_id: str,
        arrived_s: float,
        on_done: "Callable[[Request], None]",
    ) -> None:
        """`on_done` is called once, when the last token is out."""
        self.session = session
        self.index = index
        self.turn: Turn = session.turns[index]
        self.request_id = request_id
        """Says nothing about whose turn it is."""
        self.arrived_s = arrived_s
        self.on_done = on_done
        self.on_first: Callable[[], None] | None = None
        """Called once, when the first token is out."""
        self.keys = self.turn.keys
        self.prompt_tokens = self.turn.prompt_tokens
        self.num_tokens = self.prompt_tokens
        """Prompt, and output so far."""
        self.num_output = 0
        self.num_computed = 0
        self.blocks: list[int] = []
        self.service_tokens = 0
        """Computed for it so far, what had to be computed again included."""
        self.cached_tokens = 0
        """Prompt tokens it found when it was first placed."""
        self.num_preemptions = 0
        self.is_preempted = False
        """Waits again after it lost its place."""
        self.first_s: float | None = None
        self.held_since_s: float | None = None
        self.held_s = 0.0
        """How long policy kept it back before its first placing."""

    @property
    def is_prefilling(self) -> bool:
        """More than the next token is left to compute."""
        return self.num_tokens - self.num_computed > 1

    @property
    def output_left(self) -> int:
        return self.turn.output_tokens - self.num_output
