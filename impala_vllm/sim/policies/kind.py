"""The list of policies, and what `--policies` takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from impala_vllm.config import ConfigError
from impala_vllm.sim.policies.impala import Impala
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
