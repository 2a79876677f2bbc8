"""`impala router`: the fleet behind one address that speaks OpenAI's API."""

from impala_vllm.fleet.proxy.app import build
from impala_vllm.fleet.proxy.bodies import BodyConfig
from impala_vllm.fleet.proxy.gateway import Gateway, RouterOptions

__all__ = ["BodyConfig", "Gateway", "RouterOptions", "build"]
