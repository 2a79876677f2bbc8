"""What published policies are told by client ids: which program (our trace) asks, and what became of its turns.

A child session is a program of its own. Ends of programs are told as well, as their clients do.
"""

from collections.abc import Iterator, Sequence

from impala_vllm.sim.request import Request


class Program:
    """One session. Times are of the simulation."""

    __slots__ = (
        "acting_since_s",
        "arrived_s",
        "keys",
        "name",
        "num_turns",
        "placed_s",
        "request",
        "served_s",
        "service_tokens",
        "tokens",
        "tool",
        "waited_s",
        "waits_since_s",
    )

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.arrived_s = now
        self.request: Request | None = None
        """Its turn that waits or runs; None: it acts, in a tool."""
        self.acting_since_s: float | None = None
        self.placed_s: float | None = None
        """Since when its turn runs; None: it does not."""
        self.waits_since_s = now
        """Its turn, where it does not run."""
        self.tokens = 0
        """Context of its latest turn."""
        self.keys: Sequence[int] = ()
        """Blocks of its last turn that is done."""
        self.tool: str | None = None
        """What its last turn called."""
        self.num_turns = 0
        """Done."""
        self.service_tokens = 0
        """Computed for its turns that are done."""
        self.waited_s = self.served_s = 0.0
        """In queues and in service, until its turn was placed or lost its place last."""

    def attained_tokens(self) -> int:
        """Service so far, that of the turn at hand included."""
        request = self.request
        return self.service_tokens + (request.service_tokens if request is not None else 0)


class Programs:
    """Programs that are not over, in order of arrival."""

    def __init__(self) -> None:
        self._programs: dict[str, Program] = {}

    def __iter__(self) -> Iterator[Program]:
        return iter(self._programs.values())

    def __len__(self) -> int:
        return len(self._programs)

    def __contains__(self, name: object) -> bool:
        return name in self._programs

    def of(self, request: Request) -> Program:
        """Whose turn it is; the turn has arrived and the program is not over."""
        return self._programs[request.session.session_id]

    def arrive(self, request: Request, now: float) -> Program:
        """A turn of a known program, or the first of one."""
        name = request.session.session_id
        program = self._programs.get(name)
        if program is None:
            program = self._programs[name] = Program(name, now)
        program.request, program.acting_since_s, program.waits_since_s = request, None, now
        program.tokens = max(program.tokens, request.prompt_tokens)
        return program

    def placed(self, request: Request, now: float) -> None:
        """The turn runs."""
        program = self.of(request)
        if program.placed_s is None:
            program.placed_s = now
            program.waited_s += now - program.waits_since_s

    def preempted(self, request: Request, now: float) -> None:
        """The turn has lost its place and waits again."""
        program = self.of(request)
        if program.placed_s is not None:
            program.served_s += now - program.placed_s
            program.placed_s, program.waits_since_s = None, now

    def finish(self, request: Request, now: float) -> Program:
        """The turn is done; with the last one the program is over and forgotten."""
        program = self.of(request)
        program.request, program.acting_since_s = None, now
        program.served_s += now - (program.waits_since_s if program.placed_s is None else program.placed_s)
        program.placed_s = None
        program.service_tokens += request.service_tokens
        program.tokens, program.tool = request.turn.num_tokens, request.turn.tool or request.turn.outcome.value
        program.num_turns += 1
        program.keys = request.keys
        if is_last(request):
            del self._programs[program.name]
        return program


def is_last(request: Request) -> bool:
    """Does its program end with it?"""
    return request.index == len(request.session.turns) - 1
