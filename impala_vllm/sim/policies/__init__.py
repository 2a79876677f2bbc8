"""Every policy by name: what ships, what others published, and bounds that no real policy can beat."""

from impala_vllm.sim.policies.kind import KINDS, Kind, pick

__all__ = ["KINDS", "Kind", "pick"]
