"""Numbers as TensorBoard reads them: an event file, written without TensorBoard.

A file is a sequence of records (TFRecord: length, its checksum, content, its checksum), each an `Event` message of
protocol buffers, of which a run needs four fields.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventFile:
    """An event file in `folder`, to which `scalars` adds; TensorBoard shows it while it grows."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"events.out.tfevents.{time.time_ns()}.kvjax").open("wb")
        self._write(_bytes(3, b"brain.Event:2"))

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds numbers by name."""
        values = b"".join(_bytes(1, _bytes(1, name.encode()) + _float(2, value)) for name, value in numbers.items())
        self._write(_integer(2, step) + _bytes(5, values))

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _write(self, message: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + message
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))
        self._file.flush()


def crc32c(content: bytes) -> int:
    """The Castagnoli checksum (RFC 3720, appendix B.4)."""
    value = 0xFFFFFFFF
    for byte in content:
        value = _TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def _checksum(content: bytes) -> bytes:
    """As TFRecord masks it: checksums of checksums would be weak."""
    value = crc32c(content)
    return struct.pack("<I", (((value >> 15) | (value << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _row(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_TABLE = [_row(byte) for byte in range(256)]


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
