"""The trace ledger: one record a trace, written beside a server that never waits for it."""

from impala_vllm.insight.ledger.book import Book
from impala_vllm.insight.ledger.record import Header, Record
from impala_vllm.insight.ledger.writer import Writer

__all__ = ["Book", "Header", "Record", "Writer"]
