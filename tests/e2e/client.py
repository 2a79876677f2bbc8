"""A plain HTTP client for the servers under test."""

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any


class Client:
    """One server, as a program outside sees it."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def get(self, path: str) -> tuple[int, str]:
        """Status and text."""
        request = urllib.request.Request(self.url + path, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()

    def json(self, path: str) -> Any:
        """The decoded body of a GET that succeeds."""
        status, text = self.get(path)
        assert status == 200, text
        return json.loads(text)

    def post(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Any:
        """The decoded answer to a POST that succeeds."""
        with self.open(path, body, headers) as response:
            return json.load(response)

    def open(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Any:
        """The open response to a POST."""
        every = {"Content-Type": "application/json", **self._headers, **(headers or {})}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), every)
        return urllib.request.urlopen(request, timeout=120)

    def start(self, path: str, body: dict[str, Any]) -> http.client.HTTPConnection:
        """A POST that is sent and whose answer nobody reads: `close()` it to hang up."""
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.url).netloc)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **self._headers})
        return connection

    def complete(self, prompt: str | list[int], headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
        """A greedy completion of exactly `max_tokens` tokens, with its token ids."""
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": 16,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **fields,
        }
        return self.post("/v1/completions", body, headers)

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer."""
        with self.open(path, {**body, "stream": True}) as response:
            for line in response:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    yield json.loads(line[6:])

    def rows(self, of: str) -> list[dict[str, Any]]:
        """Every trace or link the server tells of, page by page."""
        rows: list[dict[str, Any]] = []
        after = ""
        while True:
            (rank,) = self.json(f"/impala/{of}?limit=7{after}")["ranks"]
            rows += rank["rows"]
            if rank["next"] is None:
                return rows
            after = f"&after={rank['next']}"

    def link(self, response_id: str) -> dict[str, Any]:
        """How the server linked the request with this response id."""
        return next(row for row in self.rows("links") if response_id in row["request_id"])

    def metric(self, line: str) -> float:
        """The value of a metric; 0 where it is not told."""
        _, text = self.get("/metrics")
        return next((float(found.rpartition(" ")[2]) for found in text.splitlines() if found.startswith(line)), 0.0)


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for something the server does in its own time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)
