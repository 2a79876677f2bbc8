"""The measured ceiling: large copies between pinned host memory and the device, each way and both at once."""

import torch

from benchmarks.gpu import device
from benchmarks.gpu.out import Out

QUESTION = "micro/gpu-link"
NUM_BYTES = 256 << 20


def run(out: Out) -> None:
    """Notes `H2D` and `D2H` in bytes a second; all other figures are quoted against them."""
    place = device.get()
    num_bytes = NUM_BYTES if place.type == "cuda" else 1 << 20
    host, other_host = device.host_bytes(num_bytes, place), device.host_bytes(num_bytes, place)
    there, other = device.device_bytes(num_bytes, place), device.device_bytes(num_bytes, place)
    copies = {
        "H2D": lambda: there.copy_(host, non_blocking=True),
        "D2H": lambda: host.copy_(there, non_blocking=True),
        "device": lambda: there.copy_(other),
    }
    for name, copy in copies.items():
        rates = [num_bytes / s for s in device.seconds(copy, place, 20)]
        median = out.figure(
            QUESTION, "torch copy_", name, "GB/s", [r / 1e9 for r in rates], better="-", size=f"{num_bytes >> 20} MiB"
        )
        out.note(**{name: median * 1e9})
        out.line(f"{name}: {median:.1f} GB/s{' read, as much written' if name == 'device' else ''}")
    if place.type != "cuda":
        return
    side = torch.cuda.Stream()

    def both() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            other_host.copy_(other, non_blocking=True)
        there.copy_(host, non_blocking=True)
        torch.cuda.current_stream().wait_stream(side)

    rates = [2 * num_bytes / s / 1e9 for s in device.seconds(both, place, 20)]
    median = out.figure(
        QUESTION, "torch copy_", "both ways", "GB/s", rates, better="-", size=f"{num_bytes >> 20} MiB each"
    )
    out.line(f"both ways at once: {median:.1f} GB/s together")
