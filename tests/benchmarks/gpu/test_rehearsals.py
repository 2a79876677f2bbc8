"""Steps go through their own logic on the CPU: every figure that a GPU run would record, none of which counts."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from benchmarks import record
from benchmarks.gpu import bandwidth, device, libraries, overlap, packing, tune, worker
from benchmarks.gpu.movers import Batch
from benchmarks.gpu.out import Out, origin
from impala_vllm.adapters.vllm.tiers.page_copy import PageCopyWorker
from impala_vllm.ops import naive, tuning


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the step does to streams, in order."""
    done: list[str] = []

    @contextlib.contextmanager
    def own_stream(place: Any) -> Iterator[None]:
        done.append("begun")
        yield
        done.append("over")

    monkeypatch.setattr(device, "own_stream", own_stream)
    # As on a GPU: only a stream of one's own takes batches.
    monkeypatch.setattr(device, "takes_batched_copies", lambda place: done[-1:] == ["begun"])
    return done


@pytest.fixture(autouse=True)
def _rehearsal(monkeypatch: pytest.MonkeyPatch, streams: list[str]):
    monkeypatch.setenv("IMPALA_GPU_REHEARSAL", "1")

    def copies(sources: Any, targets: Any, sizes: Any, **_: Any) -> None:
        naive.copy_ranges(sources, targets, sizes)

    # The driver's batch of copies, and vLLM's kernel.
    monkeypatch.setattr("vllm._custom_ops.swap_blocks_batch", copies)
    monkeypatch.setattr("vllm.v1.kv_offload.cpu.swap_blocks_triton.swap_blocks_batch", copies)


@pytest.fixture
def out(tmp_path: Path) -> Out:
    made = Out("step", tmp_path, io.StringIO(), origin(None), is_rehearsal=True)
    made.note(H2D=1e9, D2H=1e9, device=1e9)
    return made


def figures(out: Out) -> set[tuple[str, str]]:
    return {(r.variant, r.metric) for r in record.read(out.directory.glob("*.jsonl"))}


def said(out: Out) -> str:
    assert isinstance(out.terminal, io.StringIO)
    return out.terminal.getvalue()


def test_bandwidth_measures_every_mover_both_ways_on_a_stream_of_its_own(out: Out, streams: list[str]):
    bandwidth.run(out)
    movers = ("vllm", "vllm_dma", "impala", "courier", "impala_ranges", "torch_copies")
    assert figures(out) >= {(m, f"{way}, {page} KiB x 16") for m in movers for way in ("H2D", "D2H") for page in (2, 8)}
    assert figures(out) >= {
        ("courier", f"to vLLM's, {way}, {page} KiB x 1") for way in ("H2D", "D2H") for page in (2, 8)
    }
    assert "left out" not in said(out)
    assert streams == ["begun", "over"]


def test_a_mover_that_moves_other_bytes_ends_the_step(out: Out, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Batch, "impala", lambda self: lambda: None)
    with pytest.raises(ValueError, match="impala moves other bytes: H2D, 2 KiB x 1"):
        bandwidth.run(out)


def test_a_mover_that_cannot_run_is_left_out_and_named(out: Out, monkeypatch: pytest.MonkeyPatch):
    def broken(self: Batch) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Batch, "torch_copies", broken)
    bandwidth.run(out)
    assert said(out).count("torch_copies left out (RuntimeError: no such kernel)") == 1
    assert not any(variant == "torch_copies" for variant, _ in figures(out))


def test_a_mover_of_ours_that_cannot_run_fails_the_step(out: Out, monkeypatch: pytest.MonkeyPatch):
    def broken(self: Batch) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Batch, "courier", broken)
    for step in (bandwidth, overlap):
        with pytest.raises(RuntimeError, match="no such kernel"):
            step.run(out)


def test_tuning_sets_dma_against_the_kernel_and_leaves_launches_as_they_were(out: Out, streams: list[str]):
    shipped = tuning.SWAP
    tune.run(out)
    assert shipped == tuning.SWAP
    assert figures(out) >= {(name, f"D2H, 4 KiB x {count}") for name in ("vllm_dma", "impala") for count in (8, 1)}
    assert "H2D, DMA / kernel: 2 KiB x 8 " in said(out)
    assert "H2D 2 KiB: best" in said(out)
    assert streams == ["begun", "over"]


def test_overlap_says_how_much_longer_steps_take_beside_each_mover(
    out: Out, streams: list[str], monkeypatch: pytest.MonkeyPatch
):
    keep_busy = overlap.Traffic.keep_busy

    def beside(self: overlap.Traffic) -> None:
        with device.own_stream(None):  # movers are made on the model's stream and run on their own
            keep_busy(self)

    monkeypatch.setattr(overlap.Traffic, "keep_busy", beside)
    overlap.run(out)
    assert "left out" not in said(out)
    for mover in ("vllm_dma", "impala", "courier"):
        assert {(mover, f"slow-down, {way}") for way in ("H2D", "D2H", "both ways")} <= figures(out)


def test_workers_bring_back_every_byte_before_they_are_timed(out: Out):
    worker.run(out)
    assert "rehearsal: impala bring back every byte of 1, 7 blocks" in said(out)
    assert ("impala", "submit, rehearsal, H2D, 3 blocks") in figures(out)


@pytest.mark.parametrize("fault", ["loses", "strays", "reads the wrong chunk"])
def test_a_worker_that_brings_other_bytes_ends_the_step(out: Out, monkeypatch: pytest.MonkeyPatch, fault: str):
    honest = PageCopyWorker.submit_load

    def submit_load(self: PageCopyWorker, job_id: int, host: Any, gpu: Any) -> bool:
        if fault == "reads the wrong chunk":
            host.block_ids = (host.block_ids + 1) % 8
        if fault != "loses":
            honest(self, job_id, host, gpu)
        if fault == "strays":
            assert self._room is not None
            self._room.pools[0].hbm.layers[1][0] += 1
        return True

    monkeypatch.setattr(PageCopyWorker, "submit_load", submit_load)
    with pytest.raises(AssertionError, match=r"rehearsal: impala, \d blocks: tensor \d has other bytes"):
        worker.run(out)


def test_packing_goes_both_ways_with_checksums_and_without(out: Out):
    packing.run(out)
    ways = ("pack", "pack with checksums", "unpack", "unpack with checksums")
    assert figures(out) >= {(way, f"run in {where}") for way in ways for where in ("host", "device")}
    assert {"demote", "promote"} <= {variant for variant, _ in figures(out)}
    assert "of the link" in said(out)


def test_the_library_is_held_to_torch_and_its_copies_to_the_bytes(
    out: Out, streams: list[str], monkeypatch: pytest.MonkeyPatch
):
    import torch

    monkeypatch.setattr(torch.ops._C_cache_ops, "swap_blocks_batch", None, raising=False)
    libraries.run(out)
    assert "rms_norm equals torch's" in said(out)
    assert "swap_blocks_batch moves what it is told" in said(out)
    assert streams == ["begun", "over"]
    monkeypatch.setattr("vllm._custom_ops.swap_blocks_batch", lambda *_, **__: None)
    with pytest.raises(AssertionError, match="loaded other bytes"):
        libraries.run(out)
