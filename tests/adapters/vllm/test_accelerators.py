"""What counts as an accelerator, on a tree like the kernel's."""

from pathlib import Path

import pytest

from impala_vllm.adapters.vllm import accelerators


@pytest.mark.parametrize(
    ("vendor", "kind", "number"),
    [
        ("0x10de", "0x030200", 1),  # a data centre GPU
        ("0x10de", "0x030000", 1),  # one with a plug for a screen
        ("0x1002", "0x038000", 1),
        ("0x1002", "0x120000", 1),
        ("0x10de", "0x068000", 0),  # an NVSwitch
        ("0x10de", "0x040300", 0),  # a GPU's sound
        ("0x1a03", "0x030000", 0),  # a BMC's screen
        ("0x8086", "0x020000", 0),  # a network card
    ],
)
def test_accelerators_are_told_from_what_else_is_on_the_bus(
    tmp_path: Path, vendor: str, kind: str, number: int
) -> None:
    for slot in ("0000:01:00.0", "0000:02:00.0"):
        device = tmp_path / slot
        device.mkdir()
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    (tmp_path / "0000:03:00.0").mkdir()  # one that tells nothing
    assert accelerators.count(tmp_path) == 2 * number


def test_without_a_bus_there_are_none(tmp_path: Path) -> None:
    assert accelerators.count(tmp_path / "nowhere") == 0
