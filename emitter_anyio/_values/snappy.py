"""Decoding Snappy's block format, in which Emitter compresses licences and statistics."""

from __future__ import annotations


def decode(data: bytes) -> bytes:
    """
    Decompress a block.

    :raises ValueError: if the block is malformed
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
                    raise ValueError("malformed block: a copy begins before the start")
                # A copy may overlap its own output, which then repeats.
                start = out[-offset:][:size]
                out += (start * -(-size // len(start)))[:size]
    except IndexError:
        raise ValueError("malformed block: it is incomplete") from None
    if at != len(data) or len(out) != length:
        raise ValueError("malformed block: its length is wrong")
    return bytes(out)


def read_uvarint(data: bytes, at: int) -> tuple[int, int]:
    """
    Decode an unsigned integer with seven bits per byte, lowest bits first.

    :return: the integer, and the position after it
    :raises IndexError: if the data is incomplete
    """
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
