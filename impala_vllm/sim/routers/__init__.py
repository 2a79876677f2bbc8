"""Every way to choose a replica by name: this project's router, what others publish, and what gateways do."""

from impala_vllm.sim.routers.kind import DEFAULT, ROUTERS, RouterKind
from impala_vllm.sim.routers.peer import Ask, Machines, Peer

__all__ = ["DEFAULT", "ROUTERS", "Ask", "Machines", "Peer", "RouterKind"]
