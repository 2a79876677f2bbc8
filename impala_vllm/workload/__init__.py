"""Recorded load: log formats in, one `Turn` record out."""

from impala_vllm.workload.interleave import interleave
from impala_vllm.workload.links import Recogniser, links
from impala_vllm.workload.read import Format, load, read
from impala_vllm.workload.source import WorkloadError
from impala_vllm.workload.turn import Turn

__all__ = ["Format", "Recogniser", "Turn", "WorkloadError", "interleave", "links", "load", "read"]
