"""Ids on their way to kernels: whole, in memory that is used again, and never overwritten before it was read."""

from dataclasses import dataclass

import pytest
import torch

from impala_vllm.ops import Batch, Courier, PageTable, Pool, courier, id_buffers
from impala_vllm.ops.id_buffers import IdBuffers
from tests.ops.memory import packed, some_ids

CPU = torch.device("cpu")


def test_ids_arrive_and_what_is_sent_next_takes_the_same_memory() -> None:
    buffers = IdBuffers(CPU, most_pairs=4, num_slots=2)
    first = buffers.send(torch.tensor([3, 1, 2]), torch.tensor([9, 8, 7]))
    assert [t.tolist() for t in first] == [[3, 1, 2], [9, 8, 7]]
    second = buffers.send(torch.tensor([5, 6, 4, 0]), torch.tensor([1, 0, 2, 3]))
    assert [t.tolist() for t in second] == [[5, 6, 4, 0], [1, 0, 2, 3]]
    assert second[0].data_ptr() == first[0].data_ptr()
    assert buffers.num_slots == 2


@dataclass
class Read:
    """An event of a device that gets to it when the test says so."""

    is_over: bool = True

    def record(self) -> None:
        self.is_over = False

    def query(self) -> bool:
        return self.is_over


def test_pinned_memory_is_not_written_again_before_the_device_has_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Read] = []

    def made() -> Read:
        reads.append(Read())
        return reads[-1]

    monkeypatch.setattr(id_buffers, "_Past", made)
    buffers = IdBuffers(CPU, most_pairs=4, num_slots=2)
    pinned = [slot.pinned for slot in buffers._slots]
    for number in range(3):
        buffers.send(torch.tensor([number]), torch.tensor([number]))
    assert buffers.num_slots == 3, "both are on their way"
    assert [p[0].item() for p in pinned] == [0, 1]
    reads[0].is_over = True
    buffers.send(torch.tensor([7]), torch.tensor([7]))
    assert buffers.num_slots == 3
    assert [p[0].item() for p in pinned] == [7, 1]


def test_a_batch_of_more_pages_than_fit_goes_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "IdBuffers", lambda device: IdBuffers(device, most_pairs=3))
    (page,), (room,) = packed(12, [16], seed=1)[1], packed(12, [16], seed=2)[1]
    batch = Batch(Pool(PageTable.of([page]), PageTable.of([room])), some_ids(8, 12, seed=3), some_ids(8, 12, seed=4))
    Courier(CPU).store([batch])
    assert torch.equal(room[batch.host_ids], page[batch.hbm_ids])
