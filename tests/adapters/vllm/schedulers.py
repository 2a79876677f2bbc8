"""The scheduler as the engine builds it, but without an engine."""

from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.structured_output import StructuredOutputManager

from impala_vllm.adapters.vllm import choice
from impala_vllm.config import load


def build(model, asynchronous=False, mode="observe", num_blocks=64, **switches):
    """A scheduler as the engine builds it. The CPU platform has the last word on async: it is set after that."""
    told = {"mode": mode, **{name.replace("__", "."): value for name, value in switches.items()}}
    settings = load(None, {name: ("test", value) for name, value in told.items()})
    args = EngineArgs(model=model, max_model_len=512, block_size=32, scheduler_cls=choice.Choice.of(settings))
    config = args.create_engine_config()
    config.scheduler_config.async_scheduling = asynchronous
    return from_config(config, num_blocks)


def from_config(config, num_blocks=64) -> Any:
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=32, dtype=torch.float32)
    groups = [KVCacheGroupSpec(["layer"], spec)]
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        structured_output_manager=StructuredOutputManager(config),
        block_size=32,
        hash_block_size=32,
    )
