"""What a ledger says to whoever pays for the machines: tasks per dollar, where the time went, what to change."""

from impala_vllm.insight.report.advice import Advice, advise
from impala_vllm.insight.report.figures import Figures, figures
from impala_vllm.insight.report.totals import Totals

__all__ = ["Advice", "Figures", "Totals", "advise", "figures"]
