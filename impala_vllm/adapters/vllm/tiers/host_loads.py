"""What is loaded from host into HBM: how much is under way, and how fast it was seen to go."""

from impala_vllm.core.link import Link


class HostLoads:
    """Told of every load; what it sees goes to the planner's link, where there is one."""

    def __init__(self, chunk_bytes: int) -> None:
        self.num_chunks = 0
        """Loaded so far."""
        self.link: Link | None = None
        self._chunk_bytes = chunk_bytes
        self._seconds = 0.0
        self._bytes = 0
        """Said to be loaded within `_seconds`, and not told to the link yet."""

    def asked(self, num_chunks: int) -> None:
        if self.link is not None:
            self.link.queued_bytes += num_chunks * self._chunk_bytes

    def arrived(self, num_chunks: int) -> None:
        self.num_chunks += num_chunks
        self._bytes += num_chunks * self._chunk_bytes
        if self.link is not None:
            self.link.queued_bytes = max(0, self.link.queued_bytes - num_chunks * self._chunk_bytes)

    def took(self, seconds: float) -> None:
        """The workers moved bytes for so long; `arrived` says next what has come.

        Workers load their parts of a chunk side by side: seconds are of one worker, bytes of all.
        """
        if self._bytes:
            if self.link is not None:
                self.link.observe(self._bytes, self._seconds)
            self._bytes, self._seconds = 0, 0.0
        self._seconds += seconds

    def reset(self) -> None:
        """Nothing is under way any more."""
        if self.link is not None:
            self.link.queued_bytes = 0
