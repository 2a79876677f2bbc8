"""One run: a workload, a set-up and a policy give figures. Same arguments, same figures, to the bit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from impala_vllm.fleet.places import Replica as Place
from impala_vllm.fleet.places import ServerId
from impala_vllm.sim.accesses import Accesses
from impala_vllm.sim.charge import FREE, Charge
from impala_vllm.sim.client import Client, Served
from impala_vllm.sim.loop import Loop
from impala_vllm.sim.measures import Measures, measure
from impala_vllm.sim.policies import Kind
from impala_vllm.sim.replica import Replica, Step
from impala_vllm.sim.router import Router
from impala_vllm.sim.routers import DEFAULT, ROUTERS, Machines
from impala_vllm.sim.scheduler import Shape
from impala_vllm.sim.sessions import Session, Workload
from impala_vllm.sim.tiers import Room
from impala_vllm.sim.timing import Timing


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When tasks start. Recorded starts hold where all sessions share a clock, unless `num_live` says otherwise."""

    spread_s: float = 30.0
    """Starts without a recorded time lie evenly within this."""
    num_live: int | None = None
    """Closed loop: so many at a time, the next starts when one ends. None: open loop."""

    def play(self, client: Client, workload: Workload) -> None:
        """Have `client` start every task."""
        roots = workload.roots()
        if self.num_live is not None:
            num_live = min(self.num_live, len(roots))
            client.keep_live(roots, num_live, self._even(num_live))
        elif workload.has_one_clock:
            first_s = min(r.arrival_s for r in roots)
            client.start(roots, [r.arrival_s - first_s for r in roots])
        else:
            client.start(roots, self._even(len(roots)))

    def _even(self, count: int) -> list[float]:
        return [i * self.spread_s / max(1, count) for i in range(count)]


@dataclass(frozen=True, slots=True)
class Setup:
    """The machines."""

    timing: Timing
    hbm_tokens: int
    """Of each replica."""
    num_replicas: int = 1
    host_tokens: int = 0
    """Below HBM, of each replica; 0: no such tier."""
    nvme_tokens: int = 0
    """Below host."""
    arrivals: Arrivals = Arrivals()
    router: str = DEFAULT
    """Where there are several replicas, one of `ROUTERS`."""
    seed: int = 0
    """Of a router that draws lots."""
    charge: Charge = FREE
    """For deciding, whatever the policy."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run was."""

    measures: Measures
    served: tuple[Served, ...]
    computed_tokens: int
    num_preemptions: int
    busy_s: float
    misses: "Misses | None" = None
    """Of HBM, where they were counted."""


@dataclass(frozen=True, slots=True)
class Misses:
    """Blocks that turns looked up in HBM when they got their places, and did not find."""

    num_looked_up: int
    num_missed: int
    num_fewest: int
    """That Belady's MIN would have missed under the same schedule."""


def run(
    workload: Workload,
    setup: Setup,
    kind: Kind,
    on_served: Callable[[Served], None] | None = None,
    on_step: Callable[[int, Step], None] | None = None,
    counts_misses: bool = False,
) -> Outcome:
    """Serve all of `workload`. Its longest turn fits `setup.hbm_tokens`.

    `on_served` is told of every turn, `on_step` of every step with the number of its replica. `counts_misses`: on HBM
    alone only.
    """
    size = workload.block_size
    num_blocks = setup.hbm_tokens // size
    if kind.is_unbounded:
        num_blocks = sum(-(-t.num_tokens // size) for t in workload.turns())
    timing, below = setup.timing, None if kind.is_unbounded else _below(setup, size)
    shape = Shape(num_blocks, size, timing.max_num_seqs, timing.max_num_batched_tokens, below)
    loop = Loop()
    computed: set[int] = set()
    replicas = [
        Replica(loop, setup.timing, shape, kind.make, computed, setup.charge) for _ in range(setup.num_replicas)
    ]
    accesses = [Accesses() for _ in replicas] if counts_misses and below is None else []
    for replica, log in zip(replicas, accesses, strict=False):
        replica.accesses = log
    if on_step is not None:
        for number, replica in enumerate(replicas):
            replica.on_step = partial(on_step, number)
    send = replicas[0].arrive if len(replicas) == 1 else _router(setup, loop, replicas, num_blocks * size).send
    client = Client(loop, workload, send)
    client.on_served = on_served
    setup.arrivals.play(client, workload)
    loop.run()
    bytes_moved = sum(r.tiers.bytes_moved for r in replicas if r.tiers is not None)
    assert len(client.served) == workload.num_turns(), "every turn is served"
    return Outcome(
        measure(client.served, sum(r.recomputed_tokens for r in replicas), bytes_moved),
        tuple(client.served),
        sum(r.computed_tokens for r in replicas),
        sum(r.num_preemptions for r in replicas),
        sum(r.busy_s for r in replicas),
        _misses(accesses) if accesses else None,
    )


def choose(workload: Workload, num_sessions: int | None, seed: int) -> Workload:
    """So many of its tasks, picked and ordered by `seed`; recorded order where sessions share a clock."""
    roots = workload.roots()
    chosen: list[Session] = Random(seed).sample(roots, min(num_sessions or len(roots), len(roots)))
    if workload.has_one_clock:
        chosen.sort(key=lambda r: r.arrival_s)
    return workload.only(chosen)


def _misses(accesses: Sequence[Accesses]) -> Misses:
    return Misses(
        sum(a.num_looked_up for a in accesses),
        sum(a.num_missed for a in accesses),
        sum(a.fewest_missed() for a in accesses),
    )


def _router(setup: Setup, loop: Loop, replicas: Sequence[Replica], hbm_tokens: int) -> Router:
    places = [Place(ServerId(f"replica{number}")) for number in range(len(replicas))]
    machines = Machines(places, setup.timing, hbm_tokens, Random(setup.seed))
    return Router(loop, replicas, ROUTERS[setup.router].make(machines))


def _below(setup: Setup, block_size: int) -> Room | None:
    if setup.host_tokens < block_size:
        return None
    timing = setup.timing
    return Room(
        setup.host_tokens // block_size,
        setup.nvme_tokens // block_size,
        timing.kv_bytes_per_token * block_size,
        timing.host_bytes_per_s,
        timing.nvme_read_bytes_per_s,
        timing.nvme_write_bytes_per_s,
    )
