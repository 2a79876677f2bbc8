"""The list of policies, and what `--policies` takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from impala_vllm.config import ConfigError
from impala_vllm.sim.policies.atlas import Atlas
from impala_vllm.sim.policies.belady import Belady
from impala_vllm.sim.policies.concur import Concur
from impala_vllm.sim.policies.continuum import Continuum, DynamicContinuum
from impala_vllm.sim.policies.impala import Impala
from impala_vllm.sim.policies.infercept import InferCept
from impala_vllm.sim.policies.kvflow import KvFlow
from impala_vllm.sim.policies.mars import Mars
from impala_vllm.sim.policies.oracle import Oracle
from impala_vllm.sim.policies.plas import Plas
from impala_vllm.sim.policies.thunderagent import ThunderAgent, ThunderAgentProxy
from impala_vllm.sim.policies.tokencake import TokenCake
from impala_vllm.sim.policy import Policy

if TYPE_CHECKING:
    from impala_vllm.sim.replica import Replica


@dataclass(frozen=True, slots=True)
class Kind:
    """A policy to be made for each replica."""

    name: str
    about: str
    make: "Callable[[Replica], Policy]"
    is_bound: bool = False
    """Knows or has what no server can."""
    is_unbounded: bool = False
    """HBM holds everything."""


KINDS = {
    k.name: k
    for k in (
        Kind("stock", "vLLM: first come, first served; least recently used goes first", Policy),
        Kind("impala", "this project", Impala),
        Kind("continuum", "KV stays for 2 s after a turn; programs in order of arrival", Continuum),
        Kind("continuum-dynamic", "KV stays for as long as pays; programs in order of arrival", DynamicContinuum),
        Kind("plas", "Autellix: least attained service of the program first", Plas),
        Kind("atlas", "Autellix: least attained service along the critical path first", Atlas),
        Kind("infercept", "keep or drop KV in a tool call, what wastes less", InferCept),
        Kind("thunderagent", "pause whole programs while HBM is full", ThunderAgent),
        Kind("thunderagent-proxy", "the same as its public proxy does it", ThunderAgentProxy),
        Kind("concur", "a congestion window on the number of agents", Concur),
        Kind("mars", "feedback queues, heavy KV of low levels goes first", Mars),
        Kind("tokencake", "KV of long calls goes first and is loaded before they are expected to end", TokenCake),
        Kind("belady", "stock that knows which KV is used last", Belady, is_bound=True),
        Kind("kvflow", "belady that loads KV before it is used", KvFlow, is_bound=True),
        Kind("impala-oracle", "impala that knows how long tools take", Oracle, is_bound=True),
        Kind("unbounded", "stock with HBM for everything", Policy, is_bound=True, is_unbounded=True),
    )
}


def pick(names: str) -> list[Kind]:
    """Comma-separated names, or `all`. Raises ConfigError with one line."""
    if names.strip() == "all":
        return list(KINDS.values())
    wanted = list(dict.fromkeys(n.strip() for n in names.split(",") if n.strip()))
    unknown = [n for n in wanted if n not in KINDS]
    if unknown or not wanted:
        raise ConfigError(f"--policies: {', '.join(unknown) or 'nothing'} is no policy; choose from {', '.join(KINDS)}")
    return [KINDS[n] for n in wanted]
