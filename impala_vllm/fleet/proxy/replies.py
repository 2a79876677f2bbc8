"""What a client is told where no server's answer can be passed on, or not to its end."""

import json

from impala_vllm.fleet.proxy.bodies import BodyError
from impala_vllm.fleet.proxy.watch import Send


async def refuse(send: Send, status: int, message: str, retry_after_s: int | None = None, closes: bool = False) -> None:
    """An error of the router's own. `closes`: the rest of the request is not read."""
    body = json.dumps({"error": {"message": message, "type": "router_error", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if retry_after_s is not None:
        headers.append((b"retry-after", str(retry_after_s).encode()))
    if closes:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def refuse_body(send: Send, error: BodyError) -> None:
    """Of a request that was not read to its end."""
    await refuse(send, error.status, str(error), error.retry_after_s, closes=True)


async def break_off(send: Send, is_stream: bool) -> None:
    """End a stream with an error its reader understands; anything else is cut, so that it is not taken for whole."""
    if not is_stream:
        raise ConnectionError("the server broke off its answer")
    error = {"message": "the server went away during the answer", "type": "server_error", "code": 502}
    event = b"\n\ndata: " + json.dumps({"error": error}).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": event, "more_body": False})
