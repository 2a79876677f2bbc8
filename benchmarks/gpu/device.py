"""The device that steps measure on, its clock, and memory on either side of its link.

In a rehearsal it is the CPU with Triton's interpreter: the same code, figures that mean nothing.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.out import Out, Skipped


def is_rehearsal() -> bool:
    return os.environ.get("IMPALA_GPU_REHEARSAL") == "1"


def get() -> torch.device:
    """Raises Skipped where there is none."""
    if is_rehearsal():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Skipped("no GPU")
    return torch.device("cuda", 0)


def name() -> str | None:
    """As the driver says; None without one."""
    return torch.cuda.get_device_name(0) if not is_rehearsal() and torch.cuda.is_available() else None


def host_bytes(num_bytes: int, device: torch.device) -> Tensor:
    """uint8, pinned where the device is a GPU; written once, so that every page is there."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda").zero_()


def device_bytes(num_bytes: int, device: torch.device) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Launch on a stream beside CUDA's legacy default one, after all that was launched there; at the end all is done.

    The driver's batched copy refuses the default stream. vLLM's op then copies page by page and says nothing, so what
    is timed there is not what an engine does.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def takes_batched_copies(device: torch.device) -> bool:
    """Whether the driver batches copies on the current stream."""
    return device.type != "cuda" or torch.cuda.current_stream(device) != torch.cuda.default_stream(device)


def seconds(work: Callable[[], object], device: torch.device, repetitions: int, warm_up: int = 2) -> list[float]:
    """Device time of each repetition, by events on the current stream: launches and copies of tables included."""
    if is_rehearsal():
        repetitions, warm_up = min(repetitions, 2), 0
    for _ in range(warm_up):
        work()
    synchronize(device)
    taken: list[float] = []
    for _ in range(repetitions):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
    return taken


def shm_bytes() -> int:
    """Free shared memory, where host tiers live; 0 without any."""
    try:
        shm = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return shm.f_bavail * shm.f_frsize


def run(out: Out) -> None:
    """Which machine this is."""
    device = get()
    try:
        import triton

        kernels = f"triton {triton.__version__}"
    except ImportError:
        kernels = "no triton"
    out.line(f"torch {torch.__version__}, {kernels}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB of memory")
    out.line(f"/dev/shm: {shm_bytes() / 2**30:.1f} GiB free")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        out.line(
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs, "
            f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, {_link()}"
        )
    ones = torch.ones(1 << 20, device=device)
    out.line(f"adds up: {float(ones.sum()) == 1 << 20}")


def _link() -> str:
    query = "--query-gpu=driver_version,pcie.link.gen.max,pcie.link.width.max"
    try:
        found = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        )
        driver, generation, width = found.stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return "nvidia-smi says nothing of its link"
    return f"driver {driver}, PCIe gen {generation} x{width}"


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
