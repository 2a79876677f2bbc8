"""`impala router`: the fleet behind one address that speaks OpenAI's API."""

from impala_vllm.fleet.proxy.app import build
from impala_vllm.fleet.proxy.gateway import Gateway, RouterOptions

__all__ = ["Gateway", "RouterOptions", "build"]
