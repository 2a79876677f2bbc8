"""Random traffic, damage, restarts and crashes against the simplest model there is: a dict from slot to key."""

import random
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from impala_vllm.transfer.coordinator import Coordinator
from impala_vllm.transfer.jobs import Item, Job, Result
from impala_vllm.transfer.limits import Limits
from impala_vllm.transfer.messages import Forget, Withdraw
from impala_vllm.transfer.slab import Slab
from tests.transfer.virtual import ManualClock, VirtualDisk

SLOT_BYTES = 600
NUM_SLOTS = 6
BUDGET_BYTES = 16384 + NUM_SLOTS * (SLOT_BYTES + 128)
LIMITS = Limits(max_in_flight=3, max_writes_in_flight=2)
KEYS = [b"a", b"b", b"c", b"d"]

slots = st.integers(0, NUM_SLOTS - 1)
job_ids = st.integers(0, 20)
places = st.lists(
    st.tuples(slots, st.sampled_from(KEYS)), min_size=1, max_size=4, unique_by=(lambda p: p[0], lambda p: p[1])
)
actions = st.one_of(
    st.tuples(st.just("write"), places),
    st.tuples(st.just("write"), places),
    st.tuples(st.just("read"), places),
    st.tuples(st.just("forget"), slots),
    st.tuples(st.just("forget"), st.none()),
    st.tuples(st.just("cancel"), job_ids),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("settle")),
    st.tuples(st.just("damage"), slots, st.integers(0, 8 * SLOT_BYTES - 1)),
    st.tuples(st.just("restart")),
    st.tuples(st.just("crash")),
)


@settings(max_examples=200)
@given(st.lists(actions, max_size=40))
def test_a_store_may_forget_but_never_lies(script: list[tuple]):
    with TemporaryDirectory() as directory:
        store = Modelled(Path(directory))
        for verb, *arguments in script:
            getattr(store, verb)(*arguments)
        store.restart()
        store.coordinator.stop()


def data_of(key: bytes) -> bytes:
    return random.Random(key).randbytes(SLOT_BYTES)


class Modelled:
    """A store stepped in virtual time, beside its model."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = ManualClock()
        self.held: dict[int, bytes] = {}
        """The model: what the slots hold, all that is in the log being done."""
        self.log: list[int | Forget] = []
        """Jobs and forgettings since the last settling."""
        self.items: dict[int, tuple[Item, ...]] = {}
        self.jobs: dict[int, Job] = {}
        self.results: dict[int, Result] = {}
        self.serial = 0
        self.is_void = False
        """Everything was forgotten once: nothing is recovered any more."""
        self.open()

    def write(self, where: list[tuple[int, bytes]]) -> None:
        self._submit(True, where)

    def read(self, where: list[tuple[int, bytes]]) -> None:
        self._submit(False, where)

    def forget(self, slot: int | None) -> None:
        self.serial += 1
        self.is_void |= slot is None
        self.log.append(Forget(None if slot is None else (slot,), self.serial))
        self.coordinator.inbox.append(Forget(None if slot is None else (slot,), self.serial))

    def cancel(self, job_id: int) -> None:
        if job_id in self.jobs and self.jobs[job_id].has_waiting:
            self.jobs[job_id].is_withdrawn = True
            self.coordinator.inbox.append(Withdraw(job_id))

    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.coordinator.step(0.01)
        for result in self.coordinator.results:
            assert result.job_id not in self.results
            self.results[result.job_id] = result
            items = self.items[result.job_id]
            ended = [*result.done_keys, *result.failed_keys, *result.untried_keys]
            assert sorted(ended) == sorted(item.key for item in items)
            assert all(item.buffer == data_of(item.key) for item in items if item.key in result.done_keys)
        self.coordinator.results.clear()

    def settle(self) -> None:
        """Let all work end, bring the model up to date, and compare it slot by slot."""
        self.step(1)
        while self.jobs.keys() - self.results.keys():
            self.step(1)
        for entry in self.log:
            self._apply(entry)
        self.log.clear()
        for slot in range(NUM_SLOTS):
            for key in KEYS:
                assert self._holds(slot, key) == (self.held.get(slot) == key)

    def damage(self, slot: int, bit: int) -> None:
        """Flip a bit of a slot's data behind the store's back: it must find out and drop the slot."""
        self.settle()
        if slot not in self.held:
            return
        with self.slab.path.open("r+b") as file:
            file.seek(slot * SLOT_BYTES + bit // 8)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1 << bit % 8]))
        num_failures = self.coordinator.counters.num_checksum_failures
        assert not self._holds(slot, self.held.pop(slot))
        assert self.coordinator.counters.num_checksum_failures == num_failures + 1

    def restart(self) -> None:
        """End in good order and start again: nothing is lost, but of two slots with one key one stays."""
        self.settle()
        self.coordinator.stop()
        before = {} if self.is_void else dict(self.held)
        self.open()
        assert self.slab.recovered.keys() == set(before.values())
        assert self.held.items() <= before.items()
        self.settle()

    def crash(self) -> None:
        """The process dies, its ops half done, and starts again: what was not touched is there, nothing is made up."""
        possible, sure = set(self.held.items()), {} if self.is_void else dict(self.held)
        for entry in self.log:
            if isinstance(entry, Forget):
                sure = {slot: key for slot, key in sure.items() if entry.slots is not None and slot not in entry.slots}
            elif self.jobs[entry].is_write:
                written = [(item.slot, item.key) for item in self.items[entry]]
                possible.update(written)
                sure = {slot: key for slot, key in sure.items() if slot not in dict(written)}
        self.disk.crash()
        self.slab.close()
        self.open()
        assert set(self.held.items()) <= possible
        assert self.slab.recovered.keys() >= set(sure.values())
        self.settle()

    def open(self) -> None:
        """Start on what lies on disk; the model believes what the slab says it recovered."""
        self.slab = Slab.open(self.directory, BUDGET_BYTES, SLOT_BYTES, "a")
        assert (self.slab.num_slots, self.slab.num_torn) == (NUM_SLOTS, 0)
        assert self.slab.dropped is None or self.is_void
        self.is_void = False
        self.disk = VirtualDisk(self.slab.fd, self.clock)
        self.disk.seconds = lambda op: 0.001 * (1 + op.token * 5 % 7)
        self.coordinator = Coordinator(self.slab, self.disk, LIMITS, self.clock, today=lambda: 0)
        self.held = {slot: key for key, slot in self.slab.recovered.items()}
        self.log.clear()
        self.jobs.clear()
        self.results.clear()

    def _submit(self, is_write: bool, where: list[tuple[int, bytes]]) -> int:
        job_id = len(self.items)
        buffers = [bytearray(data_of(key) if is_write else SLOT_BYTES) for _, key in where]
        pairs = zip(where, buffers, strict=True)
        self.items[job_id] = tuple(Item(key, slot, memoryview(buffer)) for (slot, key), buffer in pairs)
        self.serial += 1
        job = Job(job_id, is_write, self.items[job_id], serial=self.serial)
        self.jobs[job_id] = job
        self.log.append(job_id)
        self.coordinator.inbox.append(job)
        return job_id

    def _apply(self, entry: "int | Forget") -> None:
        if isinstance(entry, Forget):
            gone = entry.slots if entry.slots is not None else self.held
            self.held = {slot: key for slot, key in self.held.items() if slot not in gone}
            return
        if not self.jobs[entry].is_write:
            return
        result = self.results[entry]
        for item in self.items[entry]:
            if item.key in result.done_keys:
                self.held[item.slot] = item.key
            elif item.key in result.failed_keys:
                self.held.pop(item.slot, None)

    def _holds(self, slot: int, key: bytes) -> bool:
        """Ask the store, nothing else being under way."""
        job_id = self._submit(False, [(slot, key)])
        while job_id not in self.results:
            self.step(1)
        self.log.remove(job_id)
        return self.results[job_id].done_keys == (key,)
