"""What several routers share through Redis: residency that one of them hears, and each other's queues."""

from impala_vllm.fleet.registry.client import RegistryConfig, RegistryError
from impala_vllm.fleet.registry.registry import Registry
from impala_vllm.fleet.registry.shared import SharedIndex
from impala_vllm.fleet.registry.source import Source

__all__ = ["Registry", "RegistryConfig", "RegistryError", "SharedIndex", "Source"]
