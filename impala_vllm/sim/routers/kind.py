"""The list of routers, and what `--router` takes."""

from collections.abc import Callable
from dataclasses import dataclass

from impala_vllm.sim.routers.blind import ConsistentHash, LeastLoaded, RoundRobin, Sticky
from impala_vllm.sim.routers.cache_aware import CacheAware
from impala_vllm.sim.routers.dynamo import DynamoCost
from impala_vllm.sim.routers.peer import Machines, Peer
from impala_vllm.sim.routers.preble import Preble


@dataclass(frozen=True, slots=True)
class RouterKind:
    """A router to be made for each run."""

    name: str
    about: str
    """Where a turn goes."""
    make: Callable[[Machines], Peer]


def _impala(machines: Machines) -> Peer:
    # It brings the hashing of prompts and with it a tokenizer, which nothing else here needs.
    from impala_vllm.sim.routers.impala import Impala

    return Impala(machines)


ROUTERS = {
    k.name: k
    for k in (
        RouterKind("sticky", "a session stays on the one it began on, the one with fewest sessions then", Sticky),
        RouterKind("round-robin", "each turn goes to the next one, whatever it has", RoundRobin),
        RouterKind("least-loaded", "each turn goes to the one with fewest requests", LeastLoaded),
        RouterKind("consistent-hash", "a session stays on the one that its id hashes to", ConsistentHash),
        RouterKind("cache-aware", "as sglang's and vLLM's router do: by what each was sent", CacheAware),
        RouterKind("dynamo", "by the cost of Dynamo's KV router, events without delay", DynamoCost),
        RouterKind("preble", "by Preble's global scheduler, events without delay", Preble),
        RouterKind("impala", "by `impala router`, told nothing but prompts; events without delay", _impala),
    )
}
DEFAULT = "sticky"
