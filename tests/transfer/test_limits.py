"""How much may wait to be written."""

import pytest

from impala_vllm.transfer.limits import staging_bytes

GIB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "item", "expected"),
    [(64 * GIB, 1 << 20, 16 * GIB), (GIB, 1 << 20, GIB // 4), (3 << 20, 1 << 20, 1 << 20)],
)
def test_a_quarter_of_memory_waits_at_most_and_an_item_always_may(memory: int, item: int, expected: int) -> None:
    assert staging_bytes(memory, item) == expected
