"""Recorded load: log formats in, one `Turn` record out."""

from impala_vllm.workload.interleave import interleave
from impala_vllm.workload.read import Format, read
from impala_vllm.workload.source import WorkloadError
from impala_vllm.workload.turn import Turn

__all__ = ["Format", "Turn", "WorkloadError", "interleave", "read"]
