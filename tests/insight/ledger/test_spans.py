"""Spans: one a finished trace, with the record's figures, through opentelemetry's own exporter."""

import pytest

pytest.importorskip("opentelemetry.sdk.trace")

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from impala_vllm.insight.ledger.record import Record, Stall, Tokens
from impala_vllm.insight.ledger.spans import Spans


def test_a_finished_trace_is_a_span_with_its_figures():
    exporter = InMemorySpanExporter()
    spans = Spans(exporter)
    spans(Record("aa/t1", 10.0, 12.5, turns=3, tokens=Tokens(hbm=7), stall=Stall(decode=1.5), gpu_s=0.25))
    spans.provider.shutdown()
    (span,) = exporter.get_finished_spans()
    assert (span.start_time, span.end_time) == (10_000_000_000, 12_500_000_000)
    found = dict(span.attributes)
    assert (found["impala.trace"], found["impala.turns"], found["impala.gpu_s"]) == ("aa/t1", 3, 0.25)
    assert (found["impala.tokens.hbm"], found["impala.stall_s.decode"]) == (7, 1.5)
    assert "impala.parent" not in found
