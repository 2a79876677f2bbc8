"""Asks a running server for its pages under /impala and its metrics."""

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

TIMEOUT_S = 5.0
MAX_ROWS = 500
"""Links asked for at a time."""
_OK = (200, 503)
"""/impala/health of a stalled server is answered with 503, and says why."""


class Unreachable(Exception):
    """Why the server cannot be asked, in a few words."""


def is_address(text: str) -> bool:
    """Whether it is the address of a server, not the name of a file."""
    return urllib.parse.urlsplit(text).scheme in ("http", "https")


def get(url: str, path: str, api_key: str | None) -> str:
    """What the server answers. Raises Unreachable."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, headers=headers), timeout=TIMEOUT_S) as answer:
            return answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as e:
        if e.code in _OK:
            return e.read().decode("utf-8", "replace")
        reasons = {401: "it wants an API key (--api-key or VLLM_API_KEY)", 404: "vLLM without --scheduler impala"}
        raise Unreachable(reasons.get(e.code, f"{path} answers {e.code}")) from e
    except (urllib.error.URLError, OSError, ValueError) as e:
        reason = getattr(e, "reason", e)
        code = getattr(reason, "errno", None)
        raise Unreachable(f"cannot be reached ({os.strerror(code) if code else reason})") from e


def get_json(url: str, path: str, api_key: str | None) -> dict[str, Any]:
    """The same, decoded. Raises Unreachable, also where it is no JSON object."""
    text = get(url, path, api_key)
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Unreachable(f"{path} answers something else than impala")
    return found


def links(url: str, api_key: str | None) -> list[tuple[int, list[dict[str, Any]]]]:
    """What the server still knows of its requests, for each rank: its block size in tokens and rows, oldest first.

    Rows that come meanwhile are left out. Raises Unreachable.
    """
    sizes: dict[int, int] = {}
    rows: dict[int, list[dict[str, Any]]] = {}
    totals: dict[int, int] = {}
    last: dict[int, int] = {}
    after = 0
    while True:
        answer = get_json(url, f"/impala/links?limit={MAX_ROWS}&after={after}", api_key)
        if "ranks" not in answer:
            raise Unreachable("the engine does not answer")
        try:
            for rank in answer["ranks"]:
                number = rank["rank"]
                sizes[number] = rank["block_tokens"]
                totals.setdefault(number, rank["total"])
                seen = last.get(number, 0)
                rows.setdefault(number, []).extend(row for row in rank["rows"] if row["number"] > seen)
                more = rank["next"] is not None and rank["rows"]
                last[number] = max(seen, rank["rows"][-1]["number"]) if more else totals[number]
        except (KeyError, TypeError) as e:
            raise Unreachable("it is another version of impala") from e
        behind = [at for number, at in last.items() if at < totals[number]]
        if not behind:
            return [(sizes[number], rows[number]) for number in sorted(rows)]
        after = min(behind)
