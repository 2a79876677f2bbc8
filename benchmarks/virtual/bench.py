"""One cold replay of a plan on an arm, in virtual time."""

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.virtual import clock
from benchmarks.virtual.engine import VirtualEngine
from benchmarks.virtual.tiers import Tiers
from impala_vllm.config import Settings
from impala_vllm.config import load as load_settings
from impala_vllm.replay.arms import Arm, Room
from impala_vllm.replay.load import Load, Run, drive
from impala_vllm.replay.measures import Measures, measure
from impala_vllm.replay.plan import Plan
from impala_vllm.replay.trial import Trial
from impala_vllm.replay.vocabulary import Vocabulary
from impala_vllm.sim.timing import Timing

BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class Bench:
    """What all replays of one call have in common."""

    model: Path
    vocabulary: Vocabulary
    timing: Timing
    max_num_seqs: int
    room: Room = field(default_factory=Room)

    def replay(self, plan: Plan, arm: Arm, num_blocks: int) -> Measures:
        """One cold run of `plan` on `arm`, all of it at once."""
        return self.trial(plan, arm, num_blocks, Load(), 0).measures

    def trial(self, plan: Plan, arm: Arm, num_blocks: int, load: Load, repetition: int) -> Trial:
        """One cold run of `plan` on `arm` as `load` says."""
        done, computed_tokens, tiers = self.run(plan, arm, num_blocks, load)
        measures = measure(done, computed_tokens=computed_tokens, new_tokens=plan.new_tokens(BLOCK_SIZE), cpu_s=0.0)
        return Trial(arm.name, repetition, done, measures, tiers=tiers)

    def run(self, plan: Plan, arm: Arm, num_blocks: int, load: Load) -> tuple[Run, int, dict[str, float]]:
        """One cold run of `plan` on `arm` as `load` says, the prompt tokens computed, and what our tiers counted."""

        async def go() -> tuple[Run, int, dict[str, float]]:
            size = 4 * num_blocks + 4000 if arm.unbounded else num_blocks
            async with VirtualEngine(
                self.model,
                settings(arm),
                self.timing,
                num_blocks=size,
                block_size=BLOCK_SIZE,
                max_num_seqs=self.max_num_seqs,
                tiers=self._tiers(arm, num_blocks),
                eos=self.vocabulary.eos,
            ) as engine:
                return await drive(plan, engine, load), engine.computed_tokens, engine.tier_stats()

        return clock.run(go())

    def _tiers(self, arm: Arm, num_blocks: int) -> Tiers | None:
        if arm.tiers is None:
            return None

        def rate(tokens_per_s: float | None) -> float | None:
            return None if tokens_per_s is None else tokens_per_s / BLOCK_SIZE

        nvme_rate = rate(self.room.nvme_tokens_per_s)
        return Tiers(
            arm.tiers,
            round(self.room.host_share * num_blocks),
            round(self.room.nvme_share * num_blocks) if arm.has_nvme else 0,
            rate(self.room.host_tokens_per_s),
            nvme_rate,
            nvme_rate,
        )


def settings(arm: Arm) -> Settings | None:
    """impala's, as the arm's flags and file say; None for stock."""
    if "--impala-mode" not in arm.args:
        return None
    mode = arm.args[arm.args.index("--impala-mode") + 1]
    switches = {f"{name}.{key}": (arm.name, v) for name, pairs in arm.config.items() for key, v in pairs.items()}
    return load_settings(None, {"mode": (arm.name, mode), **switches})
