"""XTEA with 32 cycles, which encrypts the keys of version 1 licences."""

from __future__ import annotations

import struct

_DELTA = 0x9E3779B9
_MASK = 0xFFFFFFFF


def encrypt(key: bytes, data: bytes) -> bytes:
    """Encrypt blocks of 8 bytes independently of each other."""
    k, out = struct.unpack(">4I", key), bytearray()
    for v0, v1 in struct.iter_unpack(">2I", data):
        total = 0
        for _ in range(32):
            v0 = v0 + (((v1 << 4 ^ v1 >> 5) + v1) ^ (total + k[total & 3])) & _MASK
            total = total + _DELTA & _MASK
            v1 = v1 + (((v0 << 4 ^ v0 >> 5) + v0) ^ (total + k[total >> 11 & 3])) & _MASK
        out += struct.pack(">2I", v0, v1)
    return bytes(out)


def decrypt(key: bytes, data: bytes) -> bytes:
    """Decrypt the result of :func:`encrypt`."""
    k, out = struct.unpack(">4I", key), bytearray()
    for v0, v1 in struct.iter_unpack(">2I", data):
        total = _DELTA * 32 & _MASK
        for _ in range(32):
            v1 = v1 - (((v0 << 4 ^ v0 >> 5) + v0) ^ (total + k[total >> 11 & 3])) & _MASK
            total = total - _DELTA & _MASK
            v0 = v0 - (((v1 << 4 ^ v1 >> 5) + v1) ^ (total + k[total & 3])) & _MASK
        out += struct.pack(">2I", v0, v1)
    return bytes(out)
