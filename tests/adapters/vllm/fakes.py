"""Stand-ins for the few attributes of vLLM objects that the adapters read."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

_Anything: Any = Any if TYPE_CHECKING else object
"""Base of what stands in for vLLM's classes in front of a type checker."""


@dataclass
class FakeParams:
    """SamplingParams."""

    extra_args: dict[str, Any] | None = None
    stop: list[str] = field(default_factory=list)


@dataclass
class FakeRequest(_Anything):
    """vllm.v1.request.Request."""

    request_id: str
    block_hashes: list[Any] = field(default_factory=list)
    num_prompt_tokens: int = 100
    prompt_token_ids: list[int] | None = field(default_factory=lambda: [7] * 100)
    num_tokens: int = 100
    output_token_ids: list[int] = field(default_factory=list)
    session_id: str | None = None
    cache_salt: str | None = None
    lora_request: Any = None
    sampling_params: FakeParams | None = field(default_factory=FakeParams)
    reason: str | None = "stop"
    prefill_stats: Any = None
    _block_hasher: Any = len

    def get_finished_reason(self) -> str | None:
        return self.reason


class FakeCore:
    """The engine core's client: answers snapshots, takes requests."""

    def __init__(self, snapshots: list[dict[str, Any]] | None = None) -> None:
        self.snapshots = snapshots or []
        self.pages: list[Any] = []
        self.added: list[Any] = []
        self.outcomes: list[Any] = [1]
        self.answers = True

    async def call_utility_all_async(self, method: str, page: Any) -> list[Any]:
        import asyncio

        assert method in ("impala_snapshot", "impala_outcome")
        self.pages.append(page)
        if not self.answers:
            await asyncio.Event().wait()
        return self.snapshots if method == "impala_snapshot" else self.outcomes

    async def add_request_async(self, request: Any) -> None:
        self.added.append(request)


class FakeClient:
    """AsyncLLM."""

    def __init__(self, core: FakeCore, settings: dict[str, Any]) -> None:
        self.engine_core = core
        self.errored = False
        self.vllm_config = SimpleNamespace(impala_settings=settings)


def snapshot(**changes: Any) -> dict[str, Any]:
    """What a healthy idle engine answers."""
    healthy: dict[str, Any] = {
        "rank": 0,
        "observed": True,
        "running": 0,
        "waiting": 0,
        "unfinished": 0,
        "paused": False,
        "steps": 7,
        "last_step_age_s": 1.0,
        "last_progress_age_s": 1.0,
        "stuck_s": 0.0,
        "observer_s": 0.25,
        "requests": 3,
        "pooling": 0,
        "unlinked": 0,
        "siblings": 0,
        "finished": {"stop": 3},
        "identity": {
            "on": True,
            "error": None,
            "links": {"new": 2, "continuation": 1},
            "traces": {"running": 0, "gap": 1, "ended": 1},
            "blocks": 9,
            "expired": 0,
            "evicted": 0,
            "forgotten_blocks": 0,
            "splits": 0,
        },
        "policy": None,
        "ledger": None,
        "page": {"rows": [], "next": None, "total": 0},
    }
    return {**healthy, **changes}
