"""Whether the kernels do on this device what `naive` says, to the bit and no byte beside it; the swap's round trip."""

import torch

from benchmarks.gpu import device
from benchmarks.gpu.out import Out
from benchmarks.gpu.slabs import Slab, ids
from impala_vllm import ops
from impala_vllm.ops import Batch, Courier, PageTable, Pool, naive

CASES = (
    (1, [8], False),
    (1, [64 << 10, 64 << 10], True),
    (63, [8200, 24], True),
    (63, [64 << 10], False),
    (1000, [8], True),
    (1000, [4096, 1000, 8], False),
    (1000, [16 << 10] * 4, True),
)
"""Pages, their sizes layer by layer, and whether layers are interleaved."""
REHEARSED = ((1, [8], False), (9, [1000, 24], True))
"""The interpreter takes milliseconds for each chunk."""


def run(out: Out) -> None:
    """Raises AssertionError for the first case that differs."""
    place = device.get()
    out.line(f"kernels by {'Triton' if ops.has_triton(place) else 'torch: no Triton here'}")
    cases = CASES if place.type == "cuda" else REHEARSED
    for num_pages, sizes, is_strided in cases:
        _swap(num_pages, sizes, is_strided, place)
        _pack(num_pages, sizes, is_strided, place)
        _fp8(num_pages, sizes, is_strided, place)
    out.line(f"swap, pack, unpack, checksums and FP8 equal naive in {len(cases)} cases, no canary touched")
    _round_trip(out, place)


def _swap(num_pages: int, sizes: list[int], is_strided: bool, place: torch.device) -> None:
    """Device to host, host to device and within the device, in both layouts."""
    among = num_pages + 5
    for from_host, to_host in ((False, True), (True, False), (False, False)):
        source = Slab.of(among, sizes, place, on_host=from_host, is_strided=is_strided, seed=1)
        target = Slab.of(among, sizes, place, on_host=to_host, is_strided=not is_strided, seed=2)
        at, to = ids(num_pages, among, 3), ids(num_pages, among, 4)
        wanted = _after(source, target, lambda s, t: naive.swap_pages(_table(s), at, _table(t), to))  # noqa: B023
        ops.swap_pages(PageTable.of(source.layers, place), at, PageTable.of(target.layers, place), to)
        device.synchronize(place)
        _same(target.copy(), wanted, f"swap of {num_pages} x {sizes}, host {from_host} to {to_host}")


def _pack(num_pages: int, sizes: list[int], is_strided: bool, place: torch.device) -> None:
    among = num_pages + 3
    pages = Slab.of(among, sizes, place, on_host=False, is_strided=is_strided, seed=5)
    run_slab = Slab.of(num_pages, [sum(sizes)], place, on_host=True, is_strided=False, seed=6)
    at = ids(num_pages, among, 7)
    sums = torch.empty(num_pages, dtype=torch.int64, device=place)
    table = PageTable.of(pages.layers, place)
    run_of = run_slab.layers[0]

    wanted = _after(pages, run_slab, lambda s, t: naive.pack_pages(_table(s), at, t[0]))
    ops.pack_pages(table, at, run_of, sums)
    device.synchronize(place)
    _same(run_slab.copy(), wanted, f"pack of {num_pages} x {sizes}")
    _same(sums.cpu(), naive.checksum(run_of.cpu()), f"checksums of {num_pages} x {sizes}")

    fresh = Slab.of(num_pages, [sum(sizes)], place, on_host=True, is_strided=False, seed=8)
    wanted = _after(fresh, pages, lambda s, t: naive.unpack_pages(s[0], _table(t), at))
    ops.unpack_pages(fresh.layers[0], table, at, sums)
    device.synchronize(place)
    _same(pages.copy(), wanted, f"unpack of {num_pages} x {sizes}")
    _same(sums.cpu(), naive.checksum(fresh.layers[0].cpu()), f"checksums read of {num_pages} x {sizes}")


def _fp8(num_pages: int, sizes: list[int], is_strided: bool, place: torch.device) -> None:
    pages = Slab.of(num_pages, sizes, place, on_host=False, is_strided=is_strided, seed=11)
    generator = torch.Generator().manual_seed(12)
    for layer in pages.layers:
        values = torch.randn(layer.shape[0], layer.shape[1] // 2, generator=generator).to(torch.bfloat16)
        layer.copy_(values.view(torch.uint8))
    table = PageTable.of(pages.layers, place)
    run_slab = Slab.of(num_pages, [ops.demoted_bytes(table)], place, on_host=True, is_strided=False, seed=13)
    at = ids(num_pages, num_pages, 14)
    runs, order = PageTable.of(run_slab.layers, place), torch.arange(num_pages)
    wanted = _after(pages, run_slab, lambda s, t: naive.demote_pages(_table(s), at, _table(t), order))
    ops.demote_pages(table, at, runs, order)
    device.synchronize(place)
    _same(run_slab.copy(), wanted, f"demotion of {num_pages} x {sizes}")
    wanted = _after(run_slab, pages, lambda s, t: naive.promote_pages(_table(s), order, _table(t), at))
    ops.promote_pages(runs, order, table, at)
    device.synchronize(place)
    _same(pages.copy(), wanted, f"promotion of {num_pages} x {sizes}")


def _round_trip(out: Out, place: torch.device) -> None:
    """To the host and back into other pages by courier, the first ones overwritten behind it; nobody waits between."""
    sizes, num_pages = ([16 << 10] * 8, 512) if place.type == "cuda" else ([64] * 2, 8)
    pool = Slab.of(2 * num_pages, sizes, place, on_host=False, is_strided=False, seed=9)
    tier = Slab.of(num_pages, sizes, place, on_host=True, is_strided=True, seed=10)
    both, courier = Pool(PageTable.of(pool.layers, place), PageTable.of(tier.layers, place)), Courier(place)
    old, new = torch.arange(num_pages), torch.arange(num_pages, 2 * num_pages)
    before = [layer[:num_pages].cpu().clone() for layer in pool.layers]
    stored = courier.store([Batch(both, old, old)])
    if place.type == "cuda":
        stored.end.hold_back(torch.cuda.current_stream())
    for layer in pool.layers:
        layer[:num_pages].zero_()
    # What is launched on this stream comes behind the store, and the load behind that.
    courier.load([Batch(both, new, old)]).end.wait()
    device.synchronize(place)
    for layer, wanted in zip(pool.layers, before, strict=True):
        _same(layer[num_pages:].cpu(), wanted, "round trip")
    out.line(f"round trip of {num_pages} pages of {len(sizes)} layers over pinned memory: every byte is back")


def _after(source: Slab, target: Slab, work) -> torch.Tensor:  # pyright: ignore[reportMissingParameterType]
    """The target's bytes after `work` on copies of both in ordinary host memory."""
    images = [slab.memory.cpu().clone() for slab in (source, target)]
    layers = [
        [image.as_strided(v.shape, v.stride(), v.storage_offset()) for v in slab.layers]
        for slab, image in zip((source, target), images, strict=True)
    ]
    work(layers[0], layers[1])
    return images[1]


def _table(layers: list[torch.Tensor]) -> PageTable:
    return PageTable.of(layers)


def _same(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    if not torch.equal(found, wanted):
        wrong = int((found != wanted).sum())
        raise AssertionError(f"{what}: {wrong} of {wanted.numel()} differ")
