"""`impala router`: the fleet behind one address that speaks OpenAI's API."""

from impala_vllm.fleet.proxy.app import Gateway, RouterOptions, build

__all__ = ["Gateway", "RouterOptions", "build"]
