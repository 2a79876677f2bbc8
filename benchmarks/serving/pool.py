"""How large the KV pool of the bounded arms is, given what the plan needs.

vLLM refuses a pool that cannot hold one request of the longest length it admits, and keeps one block to itself.
"""

from dataclasses import replace
from math import ceil

from impala_vllm.replay.arms import Machine
from impala_vllm.replay.plan import Plan


def oversubscribed(machine: Machine, plan: Plan, times: float) -> Machine:
    """The machine with a pool of working set / `times`. Raises ValueError where one request needs more."""
    return fitted(replace(machine, hbm_blocks=round(plan.working_set_tokens() / times / machine.block_size)), plan)


def fitted(machine: Machine, plan: Plan) -> Machine:
    """The machine with a context that its pool holds. Raises ValueError where the plan needs more."""
    room = machine.hbm_blocks - 1
    if room * machine.block_size >= machine.max_model_len:
        return machine
    longest = max(len(turn.prompt) + len(turn.output) for _, _, turn in plan.turns())
    needed = ceil(longest / machine.block_size)
    if needed > room:
        raise ValueError(
            f"a pool of {machine.hbm_blocks} blocks is too small: the longest request needs {needed} and vLLM keeps 1; "
            "give a larger one, or more sessions where it is a share of the working set"
        )
    return replace(machine, max_model_len=needed * machine.block_size)
