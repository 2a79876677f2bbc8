"""Why prompts stop sharing their prefix with the turn before: causes, cost and fixes, out of recorded load."""

from impala_vllm.insight.audit.audit import audit
from impala_vllm.insight.audit.causes import FIXES, Cause
from impala_vllm.insight.audit.document import document
from impala_vllm.insight.audit.report import Finding, Report

__all__ = ["FIXES", "Cause", "Finding", "Report", "audit", "document"]
