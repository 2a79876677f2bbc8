"""Which replica holds how much of a prompt: block keys to copies, in memory or shared."""

from impala_vllm.fleet.index.base import Depths, Index, IndexConfig, Stats
from impala_vllm.fleet.index.masks import MaskIndex
from impala_vllm.fleet.index.naive import NaiveIndex

__all__ = ["Depths", "Index", "IndexConfig", "MaskIndex", "NaiveIndex", "Stats"]
