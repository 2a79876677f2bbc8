"""Finds out whether a disk works again: writes one spare block of a slab and reads it back."""

import os

from impala_vllm.transfer.alignment import aligned_buffer
from impala_vllm.transfer.block_io import BlockIo, Completion, Op
from impala_vllm.transfer.slab import PROBE_BYTES

PROBE_TOKEN = 0
"""The token of its ops; no other op has it."""


class Probe:
    """One probe at a time: `start`, then `land` with each completion of PROBE_TOKEN until it answers."""

    def __init__(self, io: BlockIo, offset_bytes: int) -> None:
        self._io, self._offset_bytes = io, offset_bytes
        self._buffer = aligned_buffer(PROBE_BYTES)
        self._checksum: int | None = None

    def start(self) -> None:
        """Submit the write."""
        self._buffer[:] = os.urandom(PROBE_BYTES)
        self._checksum = None
        self._io.submit([Op(PROBE_TOKEN, True, self._offset_bytes, self._buffer)])

    def land(self, completion: Completion) -> bool | None:
        """Whether the disk works; None: the block is written and being read."""
        if completion.error is not None:
            return False
        if self._checksum is not None:
            return self._checksum == completion.checksum
        self._checksum = completion.checksum
        self._buffer[:] = bytes(PROBE_BYTES)
        self._io.submit([Op(PROBE_TOKEN, False, self._offset_bytes, self._buffer)])
        return None
