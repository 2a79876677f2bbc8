"""A span for each finished trace, sent to an OTLP collector by opentelemetry's own exporter and thread.

Optional: without the `opentelemetry` SDK, or with a collector that does not answer, there are no spans and no trouble.
"""

import logging
from typing import Any

from impala_vllm import __version__
from impala_vllm.insight.ledger.record import Record

logger = logging.getLogger("vllm.impala")


class Spans:
    """Call it with a record. The exporter batches, and drops what it cannot deliver."""

    def __init__(self, exporter: Any) -> None:
        """`exporter` is a SpanExporter."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self.provider = TracerProvider(resource=Resource.create({"service.name": "impala-vllm"}))
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self.provider.get_tracer("impala_vllm", __version__)

    @classmethod
    def to(cls, endpoint: str) -> "Spans | None":
        """Spans for a collector at `endpoint`; None, and a line in the log, without the library."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            return cls(OTLPSpanExporter(endpoint=endpoint))
        except ImportError as e:
            logger.warning("impala: no spans: %s; pip install opentelemetry-exporter-otlp-proto-http", e)
            return None

    def __call__(self, record: Record) -> None:
        """Hand over one span. Does not wait for the collector."""
        span = self._tracer.start_span(
            "impala.trace", start_time=round(record.start * 1e9), attributes=attributes(record)
        )
        span.end(end_time=round(record.end * 1e9))


def attributes(record: Record) -> dict[str, str | int | float | bool]:
    """What the span carries: the record's figures under their own names."""
    found: dict[str, str | int | float | bool | None] = {
        "trace": record.trace,
        "parent": record.parent,
        "session": record.session,
        "tenant": record.tenant,
        "turns": record.turns,
        "outcome": record.outcome,
        "outcome.reported": record.reported,
        "score": record.score,
        "confidence": record.confidence,
        "gpu_s": record.gpu_s,
        "gap_s": record.gap_s,
        "preemptions": record.preemptions,
        "failures": record.failures,
    }
    for name, part in (("tokens", record.tokens), ("again", record.again), ("stall_s", record.stall)):
        found |= {f"{name}.{field}": getattr(part, field) for field in part.__struct_fields__}
    return {f"impala.{name}": value for name, value in found.items() if value is not None}
