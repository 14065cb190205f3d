"""Salsa20, HSalsa20 and XSalsa20, which encrypt the keys of version 2 and 3 licences.

Only the first block of the key stream is implemented: it has 64 bytes, and a key has 24.
"""

from __future__ import annotations

import struct

_MASK = 0xFFFFFFFF
_SIGMA = struct.unpack("<4I", b"expand 32-byte k")
# The words of each quarter round: a column round and then a row round.
_QUARTERS = (
    (0, 4, 8, 12),
    (5, 9, 13, 1),
    (10, 14, 2, 6),
    (15, 3, 7, 11),
    (0, 1, 2, 3),
    (5, 6, 7, 4),
    (10, 11, 8, 9),
    (15, 12, 13, 14),
)


def block(key: bytes, data: bytes) -> bytes:
    """
    Return one block of Salsa20's key stream.

    :param key: 32 bytes
    :param data: 16 bytes: the nonce and the counter
    :return: 64 bytes
    """
    start = _state(key, data)
    end = _twenty_rounds(start)
    return struct.pack("<16I", *(a + b & _MASK for a, b in zip(start, end, strict=True)))


def hsalsa20(key: bytes, data: bytes) -> bytes:
    """Derive a key of 32 bytes from a key of 32 bytes and an input of 16 bytes."""
    x = _twenty_rounds(_state(key, data))
    return struct.pack("<8I", *(x[i] for i in (0, 5, 10, 15, 6, 7, 8, 9)))


def xsalsa20_block(key: bytes, nonce: bytes) -> bytes:
    """Return the first block of XSalsa20's key stream for a nonce of 24 bytes."""
    return block(hsalsa20(key, nonce[:16]), nonce[16:] + bytes(8))


def xor(data: bytes, stream: bytes) -> bytes:
    """XOR data with the beginning of a key stream."""
    return bytes(a ^ b for a, b in zip(data, stream, strict=False))


def _state(key: bytes, data: bytes) -> list[int]:
    k, n, s = struct.unpack("<8I", key), struct.unpack("<4I", data), _SIGMA
    return [s[0], *k[:4], s[1], *n, s[2], *k[4:], s[3]]


def _twenty_rounds(state: list[int]) -> list[int]:
    x = state.copy()
    for _ in range(10):
        for a, b, c, d in _QUARTERS:
            x[b] ^= _rotate(x[a] + x[d], 7)
            x[c] ^= _rotate(x[b] + x[a], 9)
            x[d] ^= _rotate(x[c] + x[b], 13)
            x[a] ^= _rotate(x[d] + x[c], 18)
    return x


def _rotate(value: int, bits: int) -> int:
    value &= _MASK
    return (value << bits | value >> 32 - bits) & _MASK
