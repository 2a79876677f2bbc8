"""Small workloads and machines whose figures can be computed by hand."""

from collections.abc import Callable
from dataclasses import replace

from impala_vllm.core.types import Outcome
from impala_vllm.sim.client import Client
from impala_vllm.sim.loop import Loop
from impala_vllm.sim.policy import Policy
from impala_vllm.sim.replica import Replica
from impala_vllm.sim.scheduler import Shape
from impala_vllm.sim.sessions import Session, Turn, Workload
from impala_vllm.sim.tiers import Room
from impala_vllm.sim.timing import Source, Timing

BLOCK = 4
TIMING = Timing(
    name="by-hand",
    engine="one that is easy to compute",
    source=Source.DERIVED,
    provenance="made up",
    fixed_s=1.0,
    prefill_s_per_token=0.5,
    prefill_s_per_token_and_context=0.0,
    decode_s_per_request=0.25,
    decode_s_per_context=0.0,
    kv_bytes_per_token=10,
    hbm_tokens=400,
    max_num_batched_tokens=64,
    max_num_seqs=8,
)


def session(
    name: str, prompts: list[int], output: int = 2, gap_s: float = 10.0, stem: int = 0, tool: str | None = None
) -> Session:
    """Turns with prompts of so many tokens, each a continuation of the one before; `stem` tokens are everybody's."""
    turns: list[Turn] = []
    for i, tokens in enumerate(prompts):
        is_last = i == len(prompts) - 1
        turns.append(
            Turn(
                f"{name}{i}",
                tuple(_key(name, depth, stem) for depth in range((tokens + output) // BLOCK)),
                tokens,
                output,
                gap_s if i else 0.0,
                outcome=Outcome.STOP if is_last else Outcome.TOOL_CALL,
                tool=tool,
                next_gap_s=None if is_last else gap_s,
            )
        )
    return Session(name, tuple(turns))


def with_gaps(before: Session, *gaps_s: float) -> Session:
    """The same session with other tool times."""
    turns = [
        replace(t, gap_s=gap_s, next_gap_s=after)
        for t, gap_s, after in zip(before.turns, (0.0, *gaps_s), (*gaps_s, None), strict=True)
    ]
    return replace(before, turns=tuple(turns))


def workload(*sessions: Session) -> Workload:
    return Workload(BLOCK, sessions)


class Scene:
    """One replica and the client that sends it a workload."""

    def __init__(
        self,
        load: Workload,
        num_blocks: int = 100,
        policy: Callable[[Replica], Policy] = Policy,
        timing: Timing = TIMING,
        max_num_seqs: int | None = None,
        below: Room | None = None,
    ) -> None:
        self.loop = Loop()
        shape = Shape(num_blocks, BLOCK, max_num_seqs or timing.max_num_seqs, timing.max_num_batched_tokens, below)
        self.replica = Replica(self.loop, timing, shape, policy, set())
        self.client = Client(self.loop, load, self.replica.arrive)
        self.load = load

    def play(self, *starts_s: float) -> "Scene":
        """Start every task, at zero unless said, and run to the end."""
        roots = self.load.roots()
        self.client.start(roots, starts_s or [0.0] * len(roots))
        self.loop.run()
        self.replica.pool.check_invariants()
        assert len(self.client.served) == self.load.num_turns()
        return self

    def ends(self) -> dict[tuple[str, int], float]:
        """When each turn ended."""
        return {(s.session_id, s.index): s.end_s for s in self.client.served}

    def order(self) -> list[str]:
        """Sessions in the order their turns got their first token."""
        return [s.session_id for s in sorted(self.client.served, key=lambda s: s.first_s)]


def _key(name: str, depth: int, stem: int) -> int:
    owner = "" if (depth + 1) * BLOCK <= stem else name
    return int.from_bytes(f"{owner}/{depth}".encode(), "big")
