"""Whether the bundled vLLM's native code loads and launches: its kernels against torch, its batched copies."""

import time
from typing import Any

import torch

from benchmarks.gpu import device
from benchmarks.gpu.out import Out


def run(out: Out) -> None:
    """Raises what the first broken layer raises."""
    place = device.get()
    began = time.monotonic()
    import vllm

    out.line(f"vllm {vllm.__version__} from {vllm.__path__[0]}, imported in {time.monotonic() - began:.0f} s")
    from vllm import _custom_ops

    out.line("_C loaded")
    _kernels(out, _custom_ops, place)
    if place.type != "cuda" and not hasattr(torch.ops._C_cache_ops, "swap_blocks_batch"):
        out.line("vLLM for a CPU copies no batches")
        return
    with device.own_stream(place):
        _copies(out, _custom_ops, place)


def _kernels(out: Out, custom_ops: Any, place: torch.device) -> None:
    x = torch.randn(64, 1024, device=place, dtype=torch.bfloat16)
    weight = torch.randn(1024, device=place, dtype=torch.bfloat16)
    found = torch.empty_like(x)
    custom_ops.rms_norm(found, x, weight, 1e-6)
    device.synchronize(place)
    wanted = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)) * weight.float()
    error = float((found.float() - wanted).abs().max() / wanted.abs().max())
    assert error < 0.02, f"rms_norm is off by {error:.3g} of the largest value"
    out.line(f"rms_norm equals torch's within {error:.1e}")


def _copies(out: Out, custom_ops: Any, place: torch.device) -> None:
    """Both ways, and with the source read in any order, as loads are."""
    host = device.host_bytes(1 << 20, place)
    host.random_(0, 256)
    there = device.device_bytes(1 << 20, place)
    offsets = torch.arange(256) * 4096
    sizes = torch.full((256,), 4096, dtype=torch.int64)
    custom_ops.swap_blocks_batch(
        offsets + host.data_ptr(), offsets + there.data_ptr(), sizes, is_src_access_order_any=True
    )
    device.synchronize(place)
    assert torch.equal(there.cpu(), host), "swap_blocks_batch loaded other bytes"
    host.zero_()
    custom_ops.swap_blocks_batch(offsets + there.data_ptr(), offsets + host.data_ptr(), sizes)
    device.synchronize(place)
    assert torch.equal(there.cpu(), host), "swap_blocks_batch stored other bytes"
    out.line("swap_blocks_batch moves what it is told")
