"""Chains of short keys in a tier whose traces are worth what the test says."""

from collections.abc import Sequence

from impala_vllm.core.allocator import Key
from impala_vllm.core.chains import Chains
from impala_vllm.core.types import TraceId

A, B, C = TraceId("a"), TraceId("b"), TraceId("c")
LARGE = 1000


def keys(name: str, number: int, start: int = 0) -> list[Key]:
    return [f"{name}{i}".encode() for i in range(start, start + number)]


def tier(*cheapest_first: TraceId, num_chunks: int = LARGE) -> Chains:
    """A tier in which traces are worth what their order says; those not named are worth least."""
    order = {trace_id: rank for rank, trace_id in enumerate(cheapest_first, start=1)}
    return Chains(num_chunks, lambda trace_id: order.get(trace_id, 0))


def held(chains: Chains, *turns: tuple[TraceId, Sequence[Key]]) -> None:
    """Each turn's chunks are computed and stored."""
    for trace_id, chain in turns:
        chains.use(trace_id, chain)
        chains.add([key for key in chain if key not in chains], trace_id)
        chains.check_invariants()


def everything(chains: Chains) -> list[Key]:
    return chains.victims(len(chains), list)
