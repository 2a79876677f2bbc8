"""Killed in the middle of writes, again and again: what the slab says it holds afterwards is what was written."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

from impala_vllm.transfer.alignment import aligned_buffer
from impala_vllm.transfer.block_io import open_block_io
from impala_vllm.transfer.jobs import Item
from impala_vllm.transfer.limits import Limits
from impala_vllm.transfer.nvme_store import NvmeStore
from impala_vllm.transfer.slab import Slab
from tests.transfer.finishing import finish

SLOT_BYTES = 128 << 10
NUM_KEYS = 400
NUM_ROUNDS = 8
PATIENT = Limits(stuck_s=3600.0)


def open_store(directory: Path) -> tuple[Slab, NvmeStore]:
    slab = Slab.open(directory, 8 << 20, SLOT_BYTES, "a")
    return slab, NvmeStore(slab, open_block_io(slab.fd), PATIENT)


def data_of(key: int) -> bytes:
    return random.Random(key).randbytes(64) * (SLOT_BYTES // 64)


def item(key: int, slot: int) -> Item:
    return Item(b"key%d" % key, slot, aligned_buffer(SLOT_BYTES))


def write_for_ever(directory: Path, seed: int) -> None:
    """Overwrite random slots; print a line whenever some more writes are done."""
    slab, store = open_store(directory)
    draw, job_id = random.Random(seed), 0
    busy: set[int] = set()
    slots_of: dict[int, list[int]] = {}
    while True:
        free = sorted(set(range(slab.num_slots)) - busy)
        if len(free) >= 4:
            slots = draw.sample(free, 4)
            items = [item(draw.randrange(NUM_KEYS), slot) for slot in slots]
            for each in items:
                each.buffer[:] = data_of(int(each.key[3:]))
            assert store.submit_write(job_id, items)
            slots_of[job_id] = slots
            busy.update(slots)
            job_id += 1
        for result in store.poll():
            assert not result.failed_keys
            busy.difference_update(slots_of.pop(result.job_id))
            print(result.job_id, flush=True)


def test_what_a_killed_process_leaves_verifies(tmp_path: Path):
    draw = random.Random(11)
    found = Counter[str]()
    for seed in range(NUM_ROUNDS):
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.transfer.test_crash", str(tmp_path), str(seed)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert child.stdout is not None
        for _ in range(draw.randrange(1, 60)):
            assert child.stdout.readline(), "the writer failed"
        child.kill()
        child.communicate()

        slab, store = open_store(tmp_path)
        assert slab.dropped is None
        items = [item(int(key[3:]), slot) for key, slot in slab.recovered.items()]
        found["recovered"] += len(items)
        found["torn"] += slab.num_torn
        store.submit_read(1, items)
        (result,) = finish(store).values()
        assert result.failed_keys == result.untried_keys == ()
        assert all(each.buffer == data_of(int(each.key[3:])) for each in items)
        assert store.counters.num_checksum_failures == 0
        store.close()
    assert found["torn"] == 0, "records are written whole"
    assert found["recovered"] > 10 * NUM_ROUNDS


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]), int(sys.argv[2]))
