"""What an engine says of its block hashes and KV events, for routers (see `fleet.hashing.handshake`).

The part that only the engine process knows comes from `rank`; the API process adds the model in `describe`.
"""

import uuid
from typing import Any, cast

from impala_vllm.adapters.vllm import compat
from impala_vllm.fleet.hashing.chat import names_in
from impala_vllm.fleet.hashing.handshake import EXCLUDES_TOOLS, PROBE_SALT, VERSION, chats_of

_epoch: str | None = None
"""Names this life of the engine process; made on the first question."""


def rank(scheduler: Any, dp_rank: int) -> dict[str, Any]:
    """One `handshake.Rank`. Run in the engine process, between two steps; microseconds."""
    from vllm import envs
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind

    global _epoch
    _epoch = _epoch or uuid.uuid4().hex
    algorithm = scheduler.vllm_config.cache_config.prefix_caching_hash_algo
    size = scheduler.hash_block_size
    hashes = kv_cache_utils.hash_block_tokens
    made = get_hash_fn_by_name(algorithm)
    first = hashes(made, None, range(size), (("cache_salt", PROBE_SALT),))
    groups = scheduler.kv_cache_config.kv_cache_groups
    return {
        "dp_rank": dp_rank,
        "epoch": _epoch,
        "algorithm": algorithm,
        "none_hash": kv_cache_utils.NONE_HASH.hex(),
        "block_tokens": size,
        "groups": [
            {"block_tokens": group.kv_cache_spec.block_size, "kind": get_kv_cache_spec_kind(group.kv_cache_spec).value}
            for group in groups
        ],
        "probe": [first.hex(), hashes(made, first, range(size, 2 * size), None).hex()],
        "hbm_tokens": _hbm_tokens(scheduler),
        "events": _events(scheduler),
        "integer_hashes": bool(envs.VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES),
    }


def chats(state: Any) -> str | None:
    """How this API process renders chats, by its application's state; None where it does not, or not by a template."""
    renderer = getattr(state, "online_renderer", None)
    try:
        return _chats(renderer) if renderer is not None else None
    except AttributeError:  # other tokenizers have ways of their own
        return None


def describe(vllm_config: Any, ranks: list[dict[str, Any]], rendered: str | None = None) -> dict[str, Any]:
    """The `handshake.Hello` of a server whose engines gave `ranks`, and whose chats are `rendered` as `chats` says."""
    model = vllm_config.model_config
    return {
        "version": VERSION,
        "vllm_version": compat.version() or "unknown",
        "model": model.model,
        "revision": model.revision,
        "tokenizer": model.tokenizer,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": model.max_model_len,
        "has_prefix_caching": bool(vllm_config.cache_config.enable_prefix_caching),
        "ranks": ranks,
        "chats": rendered,
    }


def _hbm_tokens(scheduler: Any) -> int | None:
    """None for several groups, which share the pool in proportions of their own."""
    groups = scheduler.kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return None
    return scheduler.kv_cache_config.num_blocks * groups[0].kv_cache_spec.block_size


def _events(scheduler: Any) -> dict[str, Any] | None:
    config = scheduler.get_kv_event_publisher_config()
    if config is None or not config.enable_kv_cache_events or config.publisher != "zmq":
        return None
    return {"endpoint": config.endpoint, "replay_endpoint": config.replay_endpoint, "topic": config.topic}


def _chats(renderer: Any) -> str | None:
    if renderer.use_harmony:
        return "harmony"
    own, template = renderer.renderer.tokenizer.chat_template, renderer.chat_template
    if isinstance(own, dict):  # several by name
        template = cast("dict[str, str]", own).get(template or "default", template)
    template = template or own
    if not isinstance(template, str):
        return None
    kind, variables = renderer.chat_template_content_format, renderer.default_chat_template_kwargs
    settings: list[object] = [kind] if kind != "auto" else []
    # vLLM sets some for every model, such as cohere_format: what no template looks at changes no chat.
    templates = [template, *(cast("dict[str, str]", own).values() if isinstance(own, dict) else ())]
    looked_at = {name for some in templates for name in names_in(some)}
    if told := sorted((name, value) for name, value in variables.items() if name in looked_at or not looked_at):
        settings.append(told)
    if renderer.exclude_tools_when_tool_choice_none:
        settings.append(EXCLUDES_TOOLS)
    return chats_of(template, *settings)
