"""`impala router` as it ships, in front of servers whose tokens stand for many and whose time is shorter.

    python -m benchmarks.fleet.ours TOKENS_EACH SPEED router --worker URL ...

Its prices in tokens and seconds are of the recording's, as those of the servers are: without that 2,048 tokens that
neighbours will want would be 65,536 at a scale of 32, and a decode step four. What is measured, and ratios, stay.
"""

import sys
from dataclasses import replace
from functools import partial

from impala_vllm.cli import main as cli
from impala_vllm.core.cost import CostConfig
from impala_vllm.fleet import proxy
from impala_vllm.fleet.proxy import RouterOptions
from impala_vllm.fleet.scoring import ScoringConfig


def scoring(tokens_each: int, speed: float) -> ScoringConfig:
    """The shipped prices in what is sent."""
    ships = ScoringConfig()
    return replace(
        ships,
        running_s=ships.running_s / speed,
        stay_s=ships.stay_s / speed,
        neighbour_tokens=max(1, round(ships.neighbour_tokens / tokens_each)),
    )


def cost(tokens_each: int, speed: float) -> CostConfig:
    """The shipped prior, and the least that is learned from, in what is sent."""
    ships = CostConfig()
    return replace(
        ships,
        prefill_s_per_token=ships.prefill_s_per_token * tokens_each / speed,
        decode_s_per_step=ships.decode_s_per_step / speed,
        min_prefill_tokens=max(1, round(ships.min_prefill_tokens / tokens_each)),
    )


def main() -> None:
    """Run the command line behind the two figures."""
    tokens_each, speed = int(sys.argv[1]), float(sys.argv[2])
    scaled = partial(RouterOptions, scoring=scoring(tokens_each, speed), cost=cost(tokens_each, speed))
    proxy.__dict__["RouterOptions"] = scaled  # where the command looks it up
    cli.main(sys.argv[3:])


if __name__ == "__main__":
    main()
