"""How many accelerators a machine has, whatever this process may use of them: servers on the others want memory too."""

from pathlib import Path

PCI_DEVICES = Path("/sys/bus/pci/devices")
_VENDORS = frozenset(("0x10de", "0x1002", "0x8086"))
"""NVIDIA, AMD, Intel."""
_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")
"""VGA, 3D and display controllers, processing accelerators. A BMC's VGA controller is another vendor's."""


def count(devices: Path = PCI_DEVICES) -> int:
    """On this machine's buses; of a container, on its host's. 0: none, or nobody may look."""
    return sum(
        _read(device / "vendor") in _VENDORS and _read(device / "class").startswith(_CLASSES)
        for device in devices.glob("*")
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
