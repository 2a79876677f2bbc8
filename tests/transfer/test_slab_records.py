"""Records survive the way through bytes, and nothing else passes for one."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impala_vllm.transfer.slab_header import (
    HEADER_BYTES,
    WEAR_OFFSET_BYTES,
    Layout,
    Wear,
    decode_wear,
    difference,
    encode_header,
    encode_wear,
    namespace_digest,
)
from impala_vllm.transfer.slab_records import EMPTY_RECORD, RECORD_BYTES, Record, Records

LAYOUT = Layout(namespace_digest("a"), 4096, 100)
SEED = LAYOUT.seed


def page(layout: Layout, wear: Wear) -> bytes:
    """A header page as it lies on disk."""
    found = bytearray(HEADER_BYTES)
    header, tail = encode_header(layout), encode_wear(wear)
    found[: len(header)] = header
    found[WEAR_OFFSET_BYTES : WEAR_OFFSET_BYTES + len(tail)] = tail
    return bytes(found)


@given(
    st.binary(min_size=1, max_size=64),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 99),
)
def test_a_record_is_read_as_it_was_put(key: bytes, length: int, checksum: int, slot: int):
    data = Records(100, SEED).put(slot, key, length, checksum)
    assert len(data) == RECORD_BYTES
    records = Records(100, SEED)
    assert records.load(data, slot) == []
    assert records.get(slot) == Record(key, length, checksum, 1)


@given(st.integers(0, 100 * 8 - 1))
def test_a_flipped_bit_makes_a_record_torn(bit: int):
    data = bytearray(Records(100, SEED).put(5, b"key", 4096, 77))
    data[bit // 8] ^= 1 << bit % 8
    records = Records(100, SEED)
    assert records.load(bytes(data), 5) == [5]
    assert records.get(5) is None


def test_a_record_of_another_slot_or_slab_is_torn():
    data = Records(100, SEED).put(5, b"key", 4096, 77)
    assert Records(100, SEED).load(data, 6) == [6]
    for other in (LAYOUT._replace(namespace=namespace_digest("b")), LAYOUT._replace(slot_bytes=8192)):
        assert Records(100, other.seed).load(data, 5) == [5]


def test_half_a_record_is_torn_and_none_is_empty():
    data = Records(100, SEED).put(5, b"k" * 64, 4096, 77)
    assert Records(100, SEED).load(data[:70] + EMPTY_RECORD[70:], 5) == [5]
    assert Records(100, SEED).load(EMPTY_RECORD, 5) == []


def test_of_two_records_with_one_key_the_later_stays():
    records = Records(10, SEED)
    for slot, key in ((3, b"a"), (4, b"b"), (1, b"a"), (2, b"c")):
        records.put(slot, key, 1, 1)
    found, stale = records.by_key()
    assert list(found.items()) == [(b"b", 4), (b"a", 1), (b"c", 2)]
    assert stale == [3]
    assert records.get(3) is None


def random_forest(draw: random.Random, num: int) -> dict[bytes, bytes | None]:
    """Parents by key, in an order in which they could be written; a few parents are lost."""
    parents: dict[bytes, bytes | None] = {}
    for i in range(num):
        above = draw.choice([None, b"lost", *parents, *[*parents][-3:]])
        parents[b"key%d" % i] = above
    return parents


@pytest.mark.parametrize("seed", range(20))
def test_a_restart_puts_no_key_behind_its_parent_and_old_chains_first(seed: int):
    draw = random.Random(seed)
    parents = random_forest(draw, 60)
    before = Records(60, SEED)
    slots = draw.sample(range(60), 60)
    written = draw.sample([*parents], 60) if seed % 2 else [*parents]
    data = {slot: before.put(slot, key, 1, 1, parents[key]) for slot, key in zip(slots, written, strict=True)}
    records = Records(60, SEED)
    assert records.load(b"".join(data[slot] for slot in range(60)), 0) == []
    found, stale = records.by_key()
    assert (found, stale) == (dict(zip(written, slots, strict=True)), [])
    place = {key: i for i, key in enumerate(found)}
    newest = {key: written.index(key) for key in found}
    """The last write of a key or of what hangs on it."""
    for key in found:
        above = parents[key]
        while above in place:
            assert place[key] < place[above]
            newest[above] = max(newest[above], newest[key])
            above = parents[above]
    assert [newest[key] for key in found] == sorted(newest.values())


def test_keys_that_name_each_other_as_parent_are_found_all_the_same():
    records = Records(4, SEED)
    for slot, (key, parent) in enumerate([(b"a", b"b"), (b"b", b"a"), (b"c", b"c")]):
        records.put(slot, key, 1, 1, parent)
    assert records.by_key()[0].keys() == {b"a", b"b", b"c"}


def test_writes_after_a_restart_are_later_than_those_before():
    before = Records(10, SEED)
    chunk = b"".join(before.put(slot, b"key%d" % slot, 1, 1) for slot in range(5))
    records = Records(10, SEED)
    records.load(chunk, 0)
    records.by_key()
    records.put(9, b"key0", 1, 1)
    assert records.by_key()[0][b"key0"] == 9


def test_a_header_fits_its_own_layout_only():
    header = page(LAYOUT, Wear())
    assert difference(header, LAYOUT) is None
    assert "8192" in (difference(header, LAYOUT._replace(slot_bytes=8192)) or "")
    assert "101" in (difference(header, LAYOUT._replace(num_slots=101)) or "")
    assert "model" in (difference(header, LAYOUT._replace(namespace=namespace_digest("b"))) or "")


@pytest.mark.parametrize("header", [b"", b"impalaKV", bytes(HEADER_BYTES), b"\xff" * HEADER_BYTES])
def test_garbage_is_no_header(header: bytes):
    assert difference(header, LAYOUT) == "it has no valid header"
    assert decode_wear(header) == Wear()


def test_another_format_says_so():
    header = bytearray(page(LAYOUT, Wear()))
    header[8] += 1
    assert difference(bytes(header), LAYOUT) == "it has no valid header"  # its CRC is not right either


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_the_wear_is_read_as_it_was_written(day: int, day_bytes: int, total_bytes: int):
    wear = Wear(day, day_bytes, total_bytes)
    assert decode_wear(page(LAYOUT, wear)) == wear


def test_a_namespace_may_be_text_or_bytes_of_any_length():
    assert namespace_digest("a") == namespace_digest(b"a")
    assert len({namespace_digest(name) for name in ("", "a", "b", "a" * 10_000)}) == 4
