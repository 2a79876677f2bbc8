"""Two arms over interleaved repetitions: the median of paired ratios and how sure it is.

Ratios of neighbours in time cancel a machine's drift; the interval is distribution-free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from impala_vllm.replay.measures import quantile


@dataclass(frozen=True, slots=True)
class Ratio:
    """variant / baseline over pairs."""

    num_pairs: int
    p20: float
    p50: float
    p80: float
    low: float
    """Lower end of the interval of the median."""
    high: float
    coverage: float
    """Chance that [low, high] holds the true median (sign test); few pairs cannot give much."""


def order(arms: Sequence[str], num_pairs: int) -> list[str]:
    """A B B A A B ...: every repetition runs all arms, every second one backwards."""
    return [arm for i in range(num_pairs) for arm in (arms if i % 2 == 0 else list(reversed(arms)))]


def ratio(baseline: Sequence[float], variant: Sequence[float]) -> Ratio:
    """Ratio of paired figures; both have one per repetition, in order. At least one pair."""
    ratios = sorted(v / b for b, v in zip(baseline, variant, strict=True))
    n = len(ratios)
    # The narrowest pair of order statistics that still covers the median in 90 % of cases, or all of them.
    cut = max((k for k in range((n + 1) // 2) if _coverage(n, k) >= 0.90), default=0)
    return Ratio(
        num_pairs=n,
        p20=quantile(ratios, 0.2),
        p50=quantile(ratios, 0.5),
        p80=quantile(ratios, 0.8),
        low=ratios[cut],
        high=ratios[n - 1 - cut],
        coverage=_coverage(n, cut),
    )


def _coverage(n: int, cut: int) -> float:
    """P(k-th smallest <= median <= k-th largest) for n independent draws, k = cut + 1."""
    return 1 - 2 * sum(comb(n, i) for i in range(cut + 1)) / 2**n
