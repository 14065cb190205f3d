"""Licences and channel keys in Emitter's formats."""

from __future__ import annotations

import base64
import re
import secrets
from dataclasses import dataclass, field, replace
from functools import lru_cache
from struct import Struct

from emitter_anyio._values import snappy
from emitter_anyio._values.channels import level_hash

from . import _salsa20, _snappy, _xtea
from ._refusals import TARGET, TARGET_TOO_DEEP, RefusedError

MASTER, READ, WRITE, STORE, LOAD, PRESENCE, EXTEND, EXECUTE = (1 << bit for bit in range(8))

_LETTERS = dict(zip("rwslpex", (READ, WRITE, STORE, LOAD, PRESENCE, EXTEND, EXECUTE), strict=True))
_EPOCH = 1262304000  # 2010 in Unix seconds; the expiry of a key counts from here
_MAX_DEPTH = 23
_EXACT = 1 << _MAX_DEPTH
_FIELDS = Struct(">HHII3sBII")
_ENCRYPTED = re.compile(r"[A-Za-z0-9_-]{32}")


def permissions(letters: str) -> int:
    """Parse permission letters; like Emitter, ignore unknown ones."""
    granted = 0
    for letter in letters:
        granted |= _LETTERS.get(letter, 0)
    return granted


def expiry(now: float, ttl: int) -> int:
    """
    Return the expiry of a key in the encoding of keys.

    :param now: the time in Unix seconds
    :param ttl: the lifetime in seconds, 0 for an unlimited one, negative for an expired key
    """
    return min(max(int(now) + ttl - _EPOCH, 1), 0xFFFFFFFF) if ttl else 0


@dataclass(frozen=True, slots=True)
class Key:
    """The decrypted content of a key."""

    salt: int
    master: int
    contract: int
    signature: int
    path: int = 0
    permissions: int = MASTER
    target: int = 0
    expires: int = 0

    @classmethod
    def from_bytes(cls, data: bytes) -> Key:
        salt, master, contract, signature, path, granted, target, expires = _FIELDS.unpack(data)
        path = int.from_bytes(path, "big")
        return cls(salt, master, contract, signature, path, granted, target, expires)

    def to_bytes(self) -> bytes:
        return _FIELDS.pack(
            self.salt,
            self.master,
            self.contract,
            self.signature,
            self.path.to_bytes(3, "big"),
            self.permissions,
            self.target,
            self.expires,
        )

    @property
    def is_secret(self) -> bool:
        return self.permissions == MASTER

    def allows(self, permission: int) -> bool:
        return self.permissions & permission != 0

    def expired(self, now: float) -> bool:
        return self.expires != 0 and now > self.expires + _EPOCH

    def with_target(self, channel: str) -> Key:
        """
        Return a copy of this key for another target.

        :raises RefusedError: if the channel is not a valid target
        """
        if not channel.endswith("/"):
            raise RefusedError(400, TARGET)
        parts, path = channel.rstrip("/").split("/"), _EXACT
        if parts[-1] == "#":
            parts, path = parts[:-1], 0
        if len(parts) > _MAX_DEPTH:
            raise RefusedError(400, TARGET_TOO_DEEP)
        for i, part in enumerate(parts):
            if part not in ("+", "#"):
                path |= _EXACT >> 1 + i
        return replace(self, path=path, target=level_hash("/".join(parts)))

    def opens(self, channel: str) -> bool:
        """Return whether the target of this key includes a channel."""
        parts = channel.rstrip("/").split("/")
        if self.path == 0:
            return self.target in (level_hash(""), level_hash(parts[0]))
        if parts[-1] == "#":
            del parts[-1]
        literal = self.path & _EXACT - 1
        # The lowest bit that is set stands for the last literal level.
        depth = _MAX_DEPTH + 1 - (literal & -literal).bit_length() if literal else len(parts)
        exact = self.path & _EXACT != 0
        if len(parts) < depth or (exact and len(parts) != depth):
            return False
        for i, part in enumerate(parts):
            if not literal & _EXACT >> 1 + i:
                parts[i] = "+"
            elif part == "+":
                return False
        return self.target == level_hash("/".join(parts[:depth]))


@dataclass(frozen=True)
class License:
    """
    A licence of Emitter, which encrypts keys.

    :param version: 1, 2 or 3
    :param text: the text of the licence, as in the configuration of a broker
    """

    version: int
    text: str = field(repr=False)
    cipher_key: bytes = field(repr=False)
    cipher_salt: bytes = field(repr=False)
    contract: int = field(repr=False)
    signature: int = field(repr=False)
    master: int = field(repr=False)

    @classmethod
    def new(cls) -> License:
        """Generate a licence of version 3."""
        key, salt = secrets.token_bytes(32), secrets.token_bytes(16)
        contract, signature = secrets.randbits(32), secrets.randbits(32)
        packed = bytes((len(key),)) + key + bytes((len(salt),)) + salt
        packed += b"".join(map(_snappy.uvarint, (contract, signature, 1)))
        text = base64.urlsafe_b64encode(_snappy.encode(packed)).decode().rstrip("=") + ":3"
        return cls(3, text, key, salt, contract, signature, 1)

    @classmethod
    def parse(cls, text: str) -> License:
        """
        Parse a licence.

        :raises ValueError: if it is malformed
        """
        body, _, version = text.partition(":")
        try:
            data = _from_base64(body)
            if version in ("", "1"):
                if len(data) != 32:
                    raise ValueError("not 32 bytes")
                contract, signature = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
                return cls(1, text, data[:16], b"", contract, signature, 1)
            salt_size = {"2": 24, "3": 16}[version]
            return cls(int(version), text, *_unpack(snappy.decode(data), salt_size))
        except (ValueError, KeyError, IndexError):
            raise ValueError(
                "invalid licence: expected the line that Emitter or `emitter license new` prints, "
                "including :2 or :3 at its end"
            ) from None

    def secret_key(self) -> str:
        """Generate a secret key, which Emitter's source calls a master key."""
        return self.encrypt(self.blank_key())

    def blank_key(self) -> Key:
        """Return a secret key of this licence with a random salt, to derive other keys from."""
        return Key(secrets.randbelow(32767), self.master, self.contract, self.signature)

    def made(self, key: Key) -> bool:
        """Return whether a decrypted key belongs to this licence and is not random content."""
        mine = (self.master, self.contract, self.signature)
        return (key.master, key.contract, key.signature) == mine

    def encrypt(self, key: Key) -> str:
        data = key.to_bytes()
        if self.version == 1:
            data = _xtea.encrypt(self.cipher_key, _salted(data))
        else:
            data = self._xor(data)
        return base64.urlsafe_b64encode(data).decode()

    @lru_cache(maxsize=1024)  # noqa: B019 -- a licence lives as long as its broker
    def decrypt(self, text: str) -> Key:
        """
        Decrypt a key. The key of another licence decrypts to random content.

        :raises ValueError: if the text is malformed
        """
        if not _ENCRYPTED.fullmatch(text):
            raise ValueError("invalid key: expected 32 letters, digits, '-' and '_'")
        data = base64.urlsafe_b64decode(text)
        if self.version == 1:
            data = _salted(_xtea.decrypt(self.cipher_key, data))
        else:
            data = self._xor(data)
        return Key.from_bytes(data)

    def _xor(self, data: bytes) -> bytes:
        if self.version == 2:
            stream = _salsa20.xsalsa20_block(self.cipher_key, self.cipher_salt)
            return _salsa20.xor(data, stream)
        salt = data[:2]
        nonce = _salsa20.xor(self.cipher_salt, salt * 8)
        stream = _salsa20.block(_salsa20.hsalsa20(self.cipher_key, nonce), nonce)
        return salt + _salsa20.xor(data[2:], stream)


def _salted(data: bytes) -> bytes:
    """XOR the rest of a key with its salt."""
    return data[:2] + _salsa20.xor(data[2:], data[:2] * 11)


def _from_base64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _unpack(data: bytes, salt_size: int) -> tuple[bytes, bytes, int, int, int]:
    key, at = data[1:33], 34
    if data[0] != 32 or data[33] != salt_size:
        raise ValueError("unexpected lengths")
    salt, at = data[at : at + salt_size], at + salt_size
    contract, at = snappy.read_uvarint(data, at)
    signature, at = snappy.read_uvarint(data, at)
    master, at = snappy.read_uvarint(data, at)
    if at != len(data) or max(contract, signature) >> 32 or master >> 16:
        raise ValueError("unexpected numbers")
    return key, salt, contract, signature, master
