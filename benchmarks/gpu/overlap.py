"""What a running decode loses while pages move: the time of a decode-like step, alone and beside swaps at full link."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu import device
from benchmarks.gpu.bandwidth import MAY_BE_MISSING
from benchmarks.gpu.movers import Move, Pages
from benchmarks.gpu.out import Out
from impala_vllm.replay.measures import quantile

QUESTION = "micro/gpu-overlap"
PAGE_BYTES = 64 << 10
"""Of a layer of an 8 B model, 16 tokens."""
NUM_PAGES = 2048
NUM_STEPS = 300
BATCH = 32


class Decode:
    """Steps that read all weights for a few rows each, as decoding does: bound by HBM, replayed from a CUDA graph."""

    def __init__(self, place: torch.device, *, num_layers: int, width: int) -> None:
        kind = torch.bfloat16 if place.type == "cuda" else torch.float32
        self._place = place
        self._weights = [torch.randn(width, width, device=place, dtype=kind) / width for _ in range(2 * num_layers)]
        self._x = torch.randn(BATCH, width, device=place, dtype=kind)
        self._graph: torch.cuda.CUDAGraph | None = None
        if place.type == "cuda":
            warm = torch.cuda.Stream()
            warm.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm):
                for _ in range(3):
                    self._run()
            torch.cuda.current_stream().wait_stream(warm)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run()
            self._graph = graph

    def step(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()

    def times_s(self, num_steps: int, before: Callable[[], None]) -> list[float]:
        """Device time of each step; `before` is called ahead of each and may launch on other streams.

        The host stays two steps ahead of the device, as an engine does.
        """
        if self._place.type != "cuda":
            return device.seconds(lambda: (before(), self.step()), self._place, num_steps, warm_up=0)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
        marks[0].record()
        for index, mark in enumerate(marks[1:]):
            marks[max(0, index - 2)].synchronize()
            before()
            self.step()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]

    def _run(self) -> Tensor:
        x = self._x
        for weight in self._weights:
            x = torch.relu(x @ weight)
        return x


class Traffic:
    """Keeps one batch under way on a side stream and the next one queued behind it."""

    def __init__(self, moves: list[Move], place: torch.device) -> None:
        self._moves = moves
        self._is_real = place.type == "cuda"
        self._streams = [torch.cuda.Stream() for _ in moves] if self._is_real else []
        self._ends: list[list[torch.cuda.Event]] = [[] for _ in moves]
        self.num_moved = 0

    def keep_busy(self) -> None:
        if not self._is_real:
            for move in self._moves:
                move()
                self.num_moved += 1
            return
        for move, stream, ends in zip(self._moves, self._streams, self._ends, strict=True):
            while ends and ends[0].query():
                ends.pop(0)
                self.num_moved += 1
            while len(ends) < 2:
                with torch.cuda.stream(stream):
                    move()
                    end = torch.cuda.Event()
                    end.record()
                ends.append(end)


def run(out: Out) -> None:
    """Each mover in each direction, and ours both ways at once."""
    place = device.get()
    is_real = place.type == "cuda"
    decode = Decode(place, num_layers=16 if is_real else 1, width=8192 if is_real else 64)
    num_steps = NUM_STEPS if is_real else 3
    decode.times_s(num_steps // 4 + 1, lambda: None)
    alone = decode.times_s(num_steps, lambda: None)
    base = quantile(alone, 0.5)
    mean = sum(alone) / len(alone)
    out.figure(QUESTION, "alone", "decode step", "ms", [s * 1e3 for s in alone], better="-")
    out.line(f"a decode step alone takes {base * 1e3:.2f} ms")
    count = NUM_PAGES if is_real else 4
    pages = Pages.of(4 * count * PAGE_BYTES if is_real else 1 << 20, place)
    batches = {direction: pages.batch(direction, PAGE_BYTES, count) for direction in ("H2D", "D2H")}
    for mover in ("vllm_dma", "impala", "courier"):
        for direction in ("H2D", "D2H", "both ways"):
            names = ("H2D", "D2H") if direction == "both ways" else (direction,)
            try:
                moves: list[Move] = [getattr(batches[name], mover)() for name in names]
                traffic = Traffic(moves, place)
                beside = decode.times_s(num_steps, traffic.keep_busy)
            except (ImportError, AttributeError, RuntimeError) as e:
                if mover not in MAY_BE_MISSING:
                    raise
                out.line(f"{mover} left out ({type(e).__name__}: {str(e)[:160]})")
                break
            slow_down = [s / mean for s in beside]
            bytes_per_s = traffic.num_moved * batches["H2D"].num_bytes / sum(beside)
            # The mean decides: what a step loses to a burst is lost.
            mean_of = sum(slow_down) / len(slow_down)
            out.figure(
                QUESTION,
                mover,
                f"slow-down, {direction}",
                "",
                [mean_of],
                better="lower",
                moved=f"{bytes_per_s / 1e9:.1f} GB/s of {PAGE_BYTES >> 10} KiB pages",
            )
            out.figure(QUESTION, mover, f"decode step, {direction}", "ms", [s * 1e3 for s in beside], better="lower")
            out.line(f"beside {mover} {direction}: {mean_of:.3f} times as long, {bytes_per_s / 1e9:.1f} GB/s moved")
