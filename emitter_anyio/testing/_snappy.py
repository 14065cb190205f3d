"""Snappy's block format, in which version 2 and 3 licences are packed."""

from __future__ import annotations


def decode(data: bytes) -> bytes:
    """
    Unpack a block.

    :raises ValueError: when it is none
    """
    try:
        length, at = read_uvarint(data, 0)
        out = bytearray()
        while at < len(data):
            tag, at = data[at], at + 1
            if tag & 3 == 0:
                size = (tag >> 2) + 1
                if size > 60:
                    wide = size - 60
                    size, at = int.from_bytes(data[at : at + wide], "little") + 1, at + wide
                out += data[at : at + size]
                at += size
            else:
                if tag & 3 == 1:
                    size, offset, at = (tag >> 2 & 7) + 4, tag >> 5 << 8 | data[at], at + 1
                else:
                    wide = 2 if tag & 3 == 2 else 4
                    size, offset = (tag >> 2) + 1, int.from_bytes(data[at : at + wide], "little")
                    at += wide
                if not 0 < offset <= len(out):
                    raise ValueError("a copy from before the start")
                for _ in range(size):  # byte by byte: a copy may run into what it writes
                    out.append(out[-offset])
    except IndexError:
        raise ValueError("cut short") from None
    if at != len(data) or len(out) != length:
        raise ValueError("not as long as it says")
    return bytes(out)


def encode(data: bytes) -> bytes:
    """Pack into literals only, which every decoder reads."""
    out = bytearray(uvarint(len(data)))
    for start in range(0, len(data), 60):
        piece = data[start : start + 60]
        out.append(len(piece) - 1 << 2)
        out += piece
    return bytes(out)


def uvarint(value: int) -> bytes:
    """Write an unsigned number, seven bits to a byte, the low ones first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_uvarint(data: bytes, at: int) -> tuple[int, int]:
    """
    Read an unsigned number.

    :return: the number, and where it ends
    :raises IndexError: when the data end before it does
    """
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
