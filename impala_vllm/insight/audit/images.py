"""What an image in a prompt counts for. Its bytes are hashed and let go; of them only the header is read."""

import base64
import binascii
import re
import struct
from dataclasses import dataclass

from impala_vllm.workload.text_blocks import BYTES_A_TOKEN

PATCH_PIXELS = 28 * 28
"""Pixels a token in Qwen2-VL and its kin; models differ, the order of size does not."""
MAX_TOKENS = 16_384
"""What Qwen2-VL scales a larger image down to; of the open models that vLLM serves few take more."""
UNKNOWN_TOKENS = 1000
"""An image behind a URL, or in a format not read here."""

_DATA = re.compile(r"data:image/[\w.+-]+;base64,")
_HEADER_CHARS = 1 << 16


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a message."""

    digest: int
    """Equal for equal bytes, or the same URL."""
    pixels: int | None
    """None where that cannot be told."""

    @property
    def tokens(self) -> int:
        """About how many the model sees."""
        return UNKNOWN_TOKENS if self.pixels is None else max(min(self.pixels // PATCH_PIXELS, MAX_TOKENS), 1)

    @property
    def num_bytes(self) -> int:
        """As text of as many tokens."""
        return self.tokens * BYTES_A_TOKEN

    @property
    def is_too_large(self) -> bool:
        """Whether the model sees less of it than was sent."""
        return self.pixels is not None and self.pixels // PATCH_PIXELS > MAX_TOKENS


def read(part: str) -> Image:
    """Of a content part as JSON text."""
    found = _DATA.search(part)
    size = None
    if found is not None:
        coded = part[found.end() : found.end() + _HEADER_CHARS].partition('"')[0]
        try:
            size = _size(base64.b64decode(coded[: len(coded) // 4 * 4]))
        except binascii.Error:
            size = None
    return Image(hash(part), None if size is None else size[0] * size[1])


def _size(data: bytes) -> tuple[int, int] | None:
    """Width and height by the header of PNG, GIF, WebP or JPEG."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return struct.unpack(">II", data[16:24])
    if data[:4] == b"GIF8" and len(data) >= 10:
        return struct.unpack("<HH", data[6:10])
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8 " and len(data) >= 30:
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return _jpeg(data) if data[:2] == b"\xff\xd8" else None


def _jpeg(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        at += 2 + length
    return None
