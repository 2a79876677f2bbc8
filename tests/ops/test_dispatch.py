"""Which version runs, here without a GPU and without Triton's interpreter."""

import subprocess
import sys

import pytest
import torch

from impala_vllm import ops
from impala_vllm.ops import PageTable
from tests.ops.memory import random_bytes

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from impala_vllm import ops
pages = [torch.arange(64, dtype=torch.uint8).view(4, 16)]
run = torch.zeros(2, 16, dtype=torch.uint8)
sums = torch.zeros(2, dtype=torch.int64)
ops.pack_pages(ops.PageTable.of(pages), torch.tensor([3, 0]), run, sums)
print(ops.has_triton(torch.device("cuda")), torch.equal(run, pages[0][[3, 0]]), bool(sums.all()))
try:
    ops.copy_ranges(sums, sums, sums, torch.device("cuda"))
except ValueError as e:
    print(e)
"""


def test_without_triton_torch_does_the_work_and_bare_gpu_addresses_are_refused() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines() == ["False True True", "copying by address on cuda needs Triton"], run.stderr[-2000:]


def test_a_cpu_without_the_interpreter_gets_torch() -> None:
    pages, copies = random_bytes(3, 16, seed=1), torch.zeros(3, 16, dtype=torch.uint8)
    assert not ops.has_triton(pages.device)
    ops.swap_pages(PageTable.of([pages]), torch.tensor([2, 0]), PageTable.of([copies]), torch.tensor([0, 1]))
    assert torch.equal(copies, torch.stack([pages[2], pages[0], torch.zeros(16, dtype=torch.uint8)]))


def test_copy_ranges_takes_bare_addresses_of_host_memory() -> None:
    source, destination = random_bytes(1, 64, seed=1)[0], torch.zeros(64, dtype=torch.uint8)
    sources = torch.tensor([source.data_ptr() + 8, source.data_ptr() + 40])
    destinations = torch.tensor([destination.data_ptr() + 32, destination.data_ptr()])
    ops.copy_ranges(sources, destinations, torch.tensor([16, 8]), source.device)
    assert torch.equal(destination[32:48], source[8:24])
    assert torch.equal(destination[:8], source[40:48])
    assert not destination[8:32].any()
    assert not destination[48:].any()


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        ([], "at least one layer"),
        ([torch.zeros(2)], r"\[num_pages, page elements\]"),
        ([torch.zeros(2, 3, 4), torch.zeros(2, 1, 4)], "as many pages in a row"),
        ([torch.zeros(4, 64, dtype=torch.uint8).t()], "lie next to each other"),
        ([torch.zeros(4, 24, dtype=torch.uint8)[:, 4:20]], "multiples of 8"),
    ],
)
def test_layers_that_a_kernel_could_not_address_are_refused(layers: list[torch.Tensor], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PageTable.of(layers)
