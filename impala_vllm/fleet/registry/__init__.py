"""What several routers share through Redis: residency that one of them hears, and each other's queues."""

from impala_vllm.fleet.registry.registry import Registry, RegistryConfig, RegistryError
from impala_vllm.fleet.registry.shared import SharedIndex

__all__ = ["Registry", "RegistryConfig", "RegistryError", "SharedIndex"]
