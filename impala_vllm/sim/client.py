"""Plays sessions: sends each turn when its turn before, its children and its tool are done.

The same rules as a replay over HTTP: a child starts after the turn that launches it, a turn that joins waits for
its children, tool time passes in between.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from impala_vllm.sim.loop import Loop
from impala_vllm.sim.request import Request
from impala_vllm.sim.sessions import Session, Workload
from impala_vllm.workload.tool_time import ToolTime


class Served(NamedTuple):
    """What became of one turn. Times are of the simulation."""

    session_id: str
    root_id: str
    index: int
    start_s: float
    first_s: float
    end_s: float
    tools_s: float
    """Tool time on the task's critical path from its beginning to this turn."""
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    held_s: float


class Client:
    """Sends to `send`; what was served is in `served`, in order of ends."""

    def __init__(self, loop: Loop, workload: Workload, send: Callable[[Request], None]) -> None:
        self.served: list[Served] = []
        self.on_served: Callable[[Served], None] | None = None
        self._loop = loop
        self._workload = workload
        self._send = send
        self._num_sent = 0

    def start(self, roots: Sequence[Session], starts_s: Sequence[float]) -> None:
        """Open loop: each task at its time."""
        for root, start_s in zip(roots, starts_s, strict=True):
            self._loop.at(start_s, partial(self._begin, root, root.session_id, ToolTime(), None))

    def keep_live(self, roots: Sequence[Session], num_live: int, starts_s: Sequence[float]) -> None:
        """Closed loop: `num_live` at a time, the first at `starts_s`, each next one when one has ended."""
        left = iter(roots[num_live:])

        def next_one(_: "_Play | None" = None) -> None:
            root = next(left, None)
            if root is not None:
                self._begin(root, root.session_id, ToolTime(), next_one)

        for root, start_s in zip(roots[:num_live], starts_s, strict=True):
            self._loop.at(start_s, partial(self._begin, root, root.session_id, ToolTime(), next_one))

    def _begin(self, session: Session, root_id: str, tools: ToolTime, on_end: "Callable[[_Play], None] | None") -> None:
        children = self._workload.children.get(session.session_id, [])
        play = _Play(session, root_id, children, tools, self._loop.now, on_end)
        self._launch(play, -1)
        self._next_turn(play)

    def _launch(self, play: "_Play", after_turn: int) -> None:
        """Start the children that this turn launches."""
        for child in play.children:
            if child.after_turn == after_turn:
                play.open[child.session_id] = None
                when_s = self._loop.now + child.start_gap_s
                tools = ToolTime(play.tools.total_s)
                tools.add(child.start_gap_s, when_s)
                done = partial(self._child_done, play, child)
                self._loop.at(when_s, partial(self._begin, child, play.root_id, tools, done))

    def _child_done(self, play: "_Play", child: Session, ended: "_Play") -> None:
        play.open[child.session_id] = _End(self._loop.now, ended.tools)
        if play.is_joining:
            self._next_turn(play)
        self._end(play)

    def _next_turn(self, play: "_Play") -> None:
        """Let the next turn's gap begin, or wait for what it joins."""
        if play.index == len(play.session.turns):
            self._end(play)
            return
        turn = play.session.turns[play.index]
        joined = [play.open[name] for name in turn.joins if name in play.open]
        ended = [end for end in joined if end is not None]
        play.is_joining = len(ended) < len(joined)
        if play.is_joining:
            return
        self._waited(play, ended)
        when_s = self._loop.now + turn.gap_s
        play.tools.add(turn.gap_s, when_s)
        self._loop.at(when_s, partial(self._ask, play))

    def _waited(self, play: "_Play", ended: "Iterable[_End]") -> None:
        """Time spent waiting for children is the last one's: of it, only its tool time is not the server's doing."""
        last = max(ended, key=lambda e: e.at_s, default=None)
        if last is not None:
            play.tools.wait_for(last.tools, play.free_s)

    def _ask(self, play: "_Play") -> None:
        self._num_sent += 1
        done = partial(self._answered, play)
        self._send(Request(play.session, play.index, f"r{self._num_sent}", self._loop.now, done))

    def _answered(self, play: "_Play", request: Request) -> None:
        now = self._loop.now
        assert request.first_s is not None
        served = Served(
            play.session.session_id, play.root_id, request.index, request.arrived_s, request.first_s, now,
            play.tools.total_s, request.prompt_tokens, request.num_output, request.cached_tokens, request.held_s,
        )  # fmt: skip
        self.served.append(served)
        play.index += 1
        play.free_s = now
        self._launch(play, request.index)
        self._next_turn(play)
        if self.on_served is not None:
            self.on_served(served)

    def _end(self, play: "_Play") -> None:
        """The session ends with its last turn and its last child."""
        if play.is_over or play.index < len(play.session.turns) or any(end is None for end in play.open.values()):
            return
        play.is_over = True
        self._waited(play, (end for end in play.open.values() if end is not None))
        if play.on_end is not None:
            play.on_end(play)


class _End(NamedTuple):
    """A child's."""

    at_s: float
    tools: ToolTime


class _Play:
    """A session that is being played."""

    __slots__ = (
        "children",
        "free_s",
        "index",
        "is_joining",
        "is_over",
        "on_end",
        "open",
        "root_id",
        "session",
        "tools",
    )

    def __init__(
        self,
        session: Session,
        root_id: str,
        children: list[Session],
        tools: ToolTime,
        free_s: float,
        on_end: "Callable[[_Play], None] | None",
    ) -> None:
        self.session = session
        self.root_id = root_id
        self.children = children
        self.on_end = on_end
        self.index = 0
        self.tools = tools
        self.free_s = free_s
        """When its last turn ended, or it began."""
        self.open: dict[str, _End | None] = {}
        """Children that were started; None: not ended."""
        self.is_joining = False
        self.is_over = False
