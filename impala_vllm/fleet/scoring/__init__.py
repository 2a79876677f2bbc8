"""Where a turn is best served, in seconds: facts in, a decision with its terms out."""

from impala_vllm.fleet.scoring.load import Elsewhere, Load
from impala_vllm.fleet.scoring.policy import Decision, Policy, Question, Reason, ScoringConfig, Terms

__all__ = ["Decision", "Elsewhere", "Load", "Policy", "Question", "Reason", "ScoringConfig", "Terms"]
