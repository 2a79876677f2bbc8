"""impala's metrics, appended to what vLLM's /metrics answers.

Built from the engines' snapshot at every scrape, so they are the same whichever API server is asked.
No label carries an id. `engine` is the data-parallel rank, as in vLLM's own metrics.
"""

import logging
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from impala_vllm.adapters.vllm.engine import Engine

logger = logging.getLogger("vllm.impala")

_Family = CounterMetricFamily | GaugeMetricFamily
_Value = Callable[[dict[str, Any]], float | None]


def _policy(snapshot: dict[str, Any], name: str) -> float | None:
    found = (snapshot["policy"] or {}).get(name)
    return None if found is None else float(found)


def _ledger(name: str, snapshot: dict[str, Any]) -> float | None:
    ledger = snapshot["ledger"]
    return None if ledger is None or not ledger["on"] else float(ledger[name])


def _tier(name: str, snapshot: dict[str, Any]) -> float | None:
    tiers = (snapshot["policy"] or {}).get("tiers")
    return None if tiers is None else tiers.get(name)


_PER_ENGINE: list[tuple[str, type[_Family], str, _Value]] = [
    ("impala_requests", CounterMetricFamily, "Requests that reached the scheduler.", lambda s: s["requests"]),
    ("impala_requests_pooling", CounterMetricFamily, "Of those, pooling requests: no trace.", lambda s: s["pooling"]),
    (
        "impala_requests_unlinked",
        CounterMetricFamily,
        "Of those, neither block hashes (prefix caching is off) nor a session id: no trace.",
        lambda s: s["unlinked"],
    ),
    (
        "impala_requests_sibling",
        CounterMetricFamily,
        "Of those, further children of one n>1 request.",
        lambda s: s["siblings"],
    ),
    ("impala_steps", CounterMetricFamily, "Engine steps finished.", lambda s: s["steps"]),
    ("impala_observer_seconds", CounterMetricFamily, "Scheduler time spent on observing.", lambda s: s["observer_s"]),
    ("impala_step_age_seconds", GaugeMetricFamily, "Since the last step finished.", lambda s: s["last_step_age_s"]),
    (
        "impala_stuck_seconds",
        GaugeMetricFamily,
        "Unfinished requests and no token computed for so long; 0 if none.",
        lambda s: s["stuck_s"],
    ),
    (
        "impala_identity_on",
        GaugeMetricFamily,
        "1: traces are recognised; 0: switched off after an error.",
        lambda s: float(s["identity"]["on"]),
    ),
    (
        "impala_policy_on",
        GaugeMetricFamily,
        "1: policy decides; 0: it failed and vLLM's own order is back. Absent unless enforcing.",
        lambda s: _policy(s, "on"),
    ),
    ("impala_held_turns", GaugeMetricFamily, "Turns held back by admission.", lambda s: _policy(s, "held")),
    (
        "impala_longest_wait_seconds",
        GaugeMetricFamily,
        "Longest a turn has waited to run since the start.",
        lambda s: _policy(s, "longest_wait_s"),
    ),
    (
        "impala_kv_blocks_evicted",
        CounterMetricFamily,
        "Blocks of known traces whose KV was given up.",
        lambda s: _policy(s, "evicted_blocks"),
    ),
    ("impala_blocks", GaugeMetricFamily, "Block hashes indexed.", lambda s: s["identity"].get("blocks")),
    (
        "impala_blocks_forgotten",
        CounterMetricFamily,
        "Block hashes forgotten with evicted traces.",
        lambda s: s["identity"].get("forgotten_blocks"),
    ),
    (
        "impala_traces_evicted",
        CounterMetricFamily,
        "Traces forgotten because the table was full.",
        lambda s: s["identity"].get("evicted"),
    ),
    (
        "impala_compactions_undone",
        CounterMetricFamily,
        "Rewritten histories that turned out to be another trace's.",
        lambda s: s["identity"].get("splits"),
    ),
    (
        "impala_traces_expired",
        CounterMetricFamily,
        "Traces ended by their lease.",
        lambda s: s["identity"].get("expired"),
    ),
]

_LEDGER: list[tuple[str, str, str]] = [
    ("records", "records", "Finished traces written to the ledger."),
    ("bytes", "bytes", "Bytes appended to the ledger."),
    ("dropped_records", "dropped", "Records lost: the disk refused, or the writer fell behind."),
    ("bare_records", "bare", "Records written without a row a turn: their byte budget was spent."),
    ("write_errors", "errors", "Attempts to write the ledger that failed."),
    ("seconds", "spent_s", "Scheduler time spent on the ledger; part of impala_observer_seconds."),
]
"""impala_ledger_NAME in the exposition, and the name in `ledger` of the snapshot."""

_TIERS: list[tuple[str, type[_Family], str]] = [
    ("host_size_bytes", GaugeMetricFamily, "Room for KV in host DRAM."),
    ("host_used_bytes", GaugeMetricFamily, "Of that, filled."),
    ("host_load_bytes", CounterMetricFamily, "KV loaded from host into HBM."),
    ("host_store_bytes", CounterMetricFamily, "KV stored from HBM to host."),
    ("host_refused_bytes", CounterMetricFamily, "KV not stored: host had nothing to give up."),
    ("host_evicted_bytes", CounterMetricFamily, "KV given up in host."),
    ("resumed_turns", CounterMetricFamily, "Turns of known traces that arrived."),
    ("resumed_turns_found", CounterMetricFamily, "Of those, all of whose earlier KV HBM and host had on arrival."),
    ("nvme_usable", GaugeMetricFamily, "1: the NVMe tier answers; 0: left alone after errors."),
    ("nvme_size_bytes", GaugeMetricFamily, "Room for KV on NVMe."),
    ("nvme_used_bytes", GaugeMetricFamily, "Of that, filled."),
    ("nvme_read_bytes", CounterMetricFamily, "KV read from NVMe and verified."),
    ("nvme_write_bytes", CounterMetricFamily, "KV written to NVMe."),
    (
        "nvme_write_today_bytes",
        GaugeMetricFamily,
        "KV written to the slab since midnight UTC, earlier servers' included.",
    ),
    ("nvme_write_ever_bytes", GaugeMetricFamily, "KV written to the slab since it was made."),
    ("nvme_unplaced_bytes", CounterMetricFamily, "KV not written: NVMe had nothing cheaper to give up."),
    ("nvme_failed_bytes", CounterMetricFamily, "KV that could not be read back: misses."),
    ("nvme_errors", CounterMetricFamily, "Reads and writes that failed."),
    ("nvme_checksum_failures", CounterMetricFamily, "Reads that gave other bytes than were written."),
    ("one_shot_bytes", CounterMetricFamily, "KV stored of traces that ended after one turn."),
    ("one_shot_nvme_bytes", CounterMetricFamily, "Of that, written to NVMe."),
]
"""Names in `policy.tiers` of the snapshot; impala_kv_NAME in the exposition."""

_PER_VALUE: list[tuple[str, type[_Family], str, str, _Value]] = [
    ("impala_traces", GaugeMetricFamily, "Traces known, by state.", "state", lambda s: s["identity"].get("traces")),
    (
        "impala_links",
        CounterMetricFamily,
        "Turns linked to a trace, by evidence.",
        "source",
        lambda s: s["identity"].get("links"),
    ),
    ("impala_requests_finished", CounterMetricFamily, "Requests ended, by reason.", "reason", lambda s: s["finished"]),
]


def exposition(snapshots: list[dict[str, Any]] | None) -> bytes:
    """The metrics as Prometheus text; only `impala_up 0` where the engines did not answer."""
    registry = CollectorRegistry()
    registry.register(_Collector([s for s in snapshots or [] if s["observed"]], snapshots is not None))
    return generate_latest(registry)


async def append(app: Any, engine: Engine, scope: Any, receive: Any, send: Any) -> None:
    """Answer GET /metrics with vLLM's text and impala's behind it."""
    try:
        ours = exposition(await engine.snapshots())
    except Exception as e:  # vLLM's own metrics must not go down with ours
        logger.warning("impala: no metrics of ours in this scrape (%s)", type(e).__name__)
        ours = b""
    # Neither compressed text nor OpenMetrics, which ends with `# EOF`, can be appended to.
    plain = {**scope, "headers": [h for h in scope["headers"] if h[0] not in (b"accept", b"accept-encoding")]}
    is_text = False

    async def send_with_ours(message: Any) -> None:
        nonlocal is_text
        if message["type"] == "http.response.start":
            is_text = message["status"] == HTTPStatus.OK
            if is_text:
                headers = [h for h in message["headers"] if h[0].lower() != b"content-length"]
                message = {**message, "headers": headers}
        elif is_text and not message.get("more_body", False):
            body = message.get("body", b"")
            message = {**message, "body": body + (b"" if body.endswith(b"\n") else b"\n") + ours}
        await send(message)

    await app(plain, receive, send_with_ours)


class _Collector:
    def __init__(self, snapshots: list[dict[str, Any]], is_up: bool) -> None:
        self._snapshots = snapshots
        self._is_up = is_up

    def collect(self) -> list[_Family]:
        """All families, for prometheus_client."""
        up = GaugeMetricFamily("impala_up", "1: the engines answered in time.", value=float(self._is_up))
        tiers = [(f"impala_kv_{name}", kind, text, partial(_tier, name)) for name, kind, text in _TIERS]
        ledger = [
            (f"impala_ledger_{name}", CounterMetricFamily, text, partial(_ledger, field))
            for name, field, text in _LEDGER
        ]
        return [up, *map(self._per_engine, (*_PER_ENGINE, *tiers, *ledger)), *map(self._per_value, _PER_VALUE)]

    def _per_engine(self, row: tuple[str, type[_Family], str, _Value]) -> _Family:
        name, kind, text, value = row
        family = kind(name, text, labels=["engine"])
        for snapshot in self._snapshots:
            found = value(snapshot)
            if found is not None:
                family.add_metric([str(snapshot["rank"])], found)
        return family

    def _per_value(self, row: tuple[str, type[_Family], str, str, Any]) -> _Family:
        name, kind, text, label, values = row
        family = kind(name, text, labels=["engine", label])
        for snapshot in self._snapshots:
            for key, found in sorted((values(snapshot) or {}).items()):
                family.add_metric([str(snapshot["rank"]), key], found)
        return family
