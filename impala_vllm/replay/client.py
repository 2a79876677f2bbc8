"""One streamed request to an OpenAI-compatible server, timed. No retries: a failure is a result."""

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from impala_vllm.replay.plan import PlannedTurn

if TYPE_CHECKING:
    import aiohttp

_PREFIX = b"data: "


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request did, on the monotonic clock."""

    start_s: float
    end_s: float
    first_token_s: float | None
    """None: no token came."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    """As `usage` says; loads from tiers below HBM count unevenly there."""
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.start_s


class Client:
    """Sends planned turns to one server. Use as an async context manager.

    `salt` keeps a repetition apart from earlier ones on the same engine. Session ids are sent only
    when asked: the point of impala is that clients need not.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        salt: str | None = None,
        forced: bool = True,
        send_session_ids: bool = False,
        timeout_s: float = 1800.0,
    ) -> None:
        self._url = f"{base_url}/v1/completions"
        self._model = model
        self._salt = salt
        self._forced = forced
        self._send_session_ids = send_session_ids
        self._timeout_s = timeout_s
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Client":
        import aiohttp  # in the `bench` extra; not needed to read plans and measures

        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        # A connection each: vLLM closes idle ones after five seconds, and a request sent at that moment is lost.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._http = aiohttp.ClientSession(timeout=timeout, connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.close()

    async def send(self, turn: PlannedTurn, request_id: str, session_id: str) -> Answer:
        """Send one turn and read its stream to the end. Never raises for what a server can do."""
        assert self._http is not None, "use `async with Client(...)`"
        import aiohttp

        headers = {"X-Request-Id": request_id}
        if self._send_session_ids:
            headers["X-Session-ID"] = session_id
        start_s = time.monotonic()
        seen = _Stream()
        try:
            async with self._http.post(self._url, json=self._body(turn), headers=headers) as response:
                if response.status != 200:
                    text = (await response.text()).strip().replace("\n", " ")
                    return Answer(start_s, time.monotonic(), None, error=f"HTTP {response.status}: {text[:300]}")
                async for line in response.content:
                    seen.feed(line)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as e:
            return Answer(start_s, time.monotonic(), seen.first_token_s, error=f"{type(e).__name__}: {e}")
        error = seen.error
        if error is None and not seen.usage:
            error = "the stream ended without usage"
        return Answer(
            start_s,
            time.monotonic(),
            seen.first_token_s,
            prompt_tokens=int(seen.usage.get("prompt_tokens", 0)),
            output_tokens=int(seen.usage.get("completion_tokens", 0)),
            cached_tokens=int((seen.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
            error=error,
        )

    def _body(self, turn: PlannedTurn) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": turn.prompt,
            "max_tokens": len(turn.output),
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._forced:
            body["vllm_xargs"] = {"forced_output": turn.output}
        else:
            body["ignore_eos"] = True
        if self._salt is not None:
            body["cache_salt"] = self._salt
        return body


class _Stream:
    """Server-sent events of one completion."""

    def __init__(self) -> None:
        self.first_token_s: float | None = None
        self.usage: dict[str, Any] = {}
        self.error: str | None = None

    def feed(self, line: bytes) -> None:
        if not line.startswith(_PREFIX) or line.startswith(b"data: [DONE]"):
            return
        event: dict[str, Any] = json.loads(line[len(_PREFIX) :])
        if "error" in event:
            self.error = str(event["error"])[:300]
        if event.get("choices") and self.first_token_s is None:
            self.first_token_s = time.monotonic()
        if event.get("usage"):
            self.usage = event["usage"]
