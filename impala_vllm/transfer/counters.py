"""What an NVMe store has done since its start."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Totals. Written by the coordinator's thread, read by any."""

    num_reads: int = 0
    """Items read and verified."""
    read_bytes: int = 0
    num_writes: int = 0
    """Items written and recorded."""
    write_bytes: int = 0
    num_read_errors: int = 0
    """Errors of the disk or the file system, short reads included."""
    num_write_errors: int = 0
    num_checksum_failures: int = 0
    """Reads that gave other bytes than were written."""
    num_key_mismatches: int = 0
    """Reads of a slot that holds another key or nothing: the caller's index was out of date."""
