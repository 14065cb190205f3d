"""Encoding Snappy's block format, for licences and statistics."""

from __future__ import annotations


def encode(data: bytes) -> bytes:
    """Encode data as a block of literals, without compression."""
    out = bytearray(uvarint(len(data)))
    for start in range(0, len(data), 60):
        piece = data[start : start + 60]
        out.append(len(piece) - 1 << 2)
        out += piece
    return bytes(out)


def uvarint(value: int) -> bytes:
    """Encode an unsigned integer with seven bits per byte, lowest bits first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
