"""What an emulated server says of itself: its handshake, and its metrics under vLLM's names."""

from typing import Any

from benchmarks.fleet.publisher import Publisher
from impala_vllm.fleet.hashing import Scheme, handshake

MAX_LEN = 1_000_000


def hello(
    scheme: Scheme, publisher: Publisher | None, epoch: str, hbm_tokens: int, chats: str | None
) -> dict[str, Any]:
    """The body of /impala/hello."""
    rank = {
        "dp_rank": 0,
        "epoch": epoch,
        "algorithm": scheme.algorithm,
        "none_hash": scheme.none_hash.hex(),
        "block_tokens": scheme.block_tokens,
        "groups": [{"block_tokens": scheme.block_tokens, "kind": "full_attention"}],
        "probe": handshake.probe(scheme),
        "events": publisher and {"endpoint": publisher.endpoint, "replay_endpoint": publisher.replay_endpoint},
        "hbm_tokens": hbm_tokens,
    }
    return {
        "version": handshake.VERSION,
        "vllm_version": "emulated",
        "model": "emulated",
        "tokenizer": "emulated",
        "dtype": "none",
        "max_model_len": MAX_LEN,
        "ranks": [rank],
        "chats": chats,
    }


def metrics(kv_usage: float, num_running: int, num_waiting: int) -> str:
    """The part of /metrics that routers read."""
    now = {
        "kv_cache_usage_perc": kv_usage,
        "num_requests_running": num_running,
        "num_requests_waiting": num_waiting,
    }
    return "".join(f'vllm:{name}{{engine="0",model_name="emulated"}} {value}\n' for name, value in now.items())
