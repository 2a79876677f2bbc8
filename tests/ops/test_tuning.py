"""Launch numbers say where they come from."""

import ast
from pathlib import Path

import pytest

from impala_vllm.ops import tuning

SOURCE = ast.parse(Path(tuning.__file__).read_text(encoding="utf-8")).body
NUMBERS = {
    node.targets[0].id: SOURCE[at + 1]
    for at, node in enumerate(SOURCE[:-1])
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_names_the_record_it_was_tuned_by_or_says_that_it_was_not(name: str) -> None:
    follows = NUMBERS[name]
    assert isinstance(follows, ast.Expr)
    assert isinstance(follows.value, ast.Constant)
    words = str(follows.value.value)
    assert "Untuned" in words or "benchmarks/results/" in words


def test_the_numbers_are_all_there() -> None:
    assert {"SWAP", "PACK", "FP8", "DMA_FROM_BYTES", "DMA_DESCRIPTORS", "KERNEL_FROM_PAGES"} <= NUMBERS.keys()


@pytest.mark.parametrize("launch", [tuning.SWAP, tuning.PACK, tuning.FP8])
def test_a_chunk_is_a_power_of_two_words(launch: tuning.Launch) -> None:
    assert launch.chunk_bytes >= 8
    assert launch.chunk_bytes & (launch.chunk_bytes - 1) == 0
