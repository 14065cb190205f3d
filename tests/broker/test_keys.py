"""Licences and keys, compared with those of an Emitter broker."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio.testing import _salsa20, _snappy, _xtea
from emitter_anyio.testing._keys import (
    EXECUTE,
    EXTEND,
    LOAD,
    MASTER,
    PRESENCE,
    READ,
    STORE,
    WRITE,
    Key,
    License,
    expiry,
    permissions,
)
from emitter_anyio.testing._refusals import RefusedError

VECTORS = json.loads(Path(__file__).with_name("key-vectors.json").read_text())
LICENSES = [License.parse(vector["licence"]) for vector in VECTORS]
KEYS_OF_EMITTER = [
    pytest.param(license, made["channel"], made["permissions"], made["key"], made["fields"])
    for license, vector in zip(LICENSES, VECTORS, strict=True)
    for made in vector["keys"]
]

words32 = st.integers(0, 2**32 - 1)
words16 = st.integers(0, 2**16 - 1)
bytes8 = st.integers(0, 255)
keys = st.builds(
    Key, words16, words16, words32, words32, st.integers(0, 2**24 - 1), bytes8, words32, words32
)


def license_of(version: int) -> st.SearchStrategy[License]:
    key_size = 16 if version == 1 else 32
    salt_size = {1: 0, 2: 24, 3: 16}[version]
    key, salt = (
        st.binary(min_size=key_size, max_size=key_size),
        st.binary(min_size=salt_size, max_size=salt_size),
    )
    return st.builds(License, st.just(version), st.just(""), key, salt, words32, words32, words16)


licenses = st.sampled_from([1, 2, 3]).flatmap(license_of)


@pytest.mark.parametrize(("license", "channel", "letters", "text", "fields"), KEYS_OF_EMITTER)
def test_key_of_an_emitter_broker(
    license: License, channel: str, letters: str, text: str, fields: dict[str, Any]
) -> None:
    key = license.decrypt(text)
    assert key == Key(**fields)
    assert license.encrypt(key) == text
    assert license.made(key)
    assert not key.is_secret
    made = replace(key, path=0, target=0).with_target(channel)
    assert made == key
    assert permissions(letters) == key.permissions


@pytest.mark.parametrize(("license", "vector"), list(zip(LICENSES, VECTORS, strict=True)))
def test_secret_key_of_an_emitter_broker(license: License, vector: dict[str, Any]) -> None:
    key = license.decrypt(vector["secret"])
    assert key == Key(**vector["secret_fields"])
    assert license.encrypt(key) == vector["secret"]
    assert key.is_secret
    assert license.made(key)


@given(licenses, keys)
def test_encrypted_key_is_decrypted(license: License, key: Key) -> None:
    text = license.encrypt(key)
    assert len(text) == 32
    assert License.decrypt.__wrapped__(license, text) == key


@given(keys)
def test_encoded_key_is_decoded(key: Key) -> None:
    assert len(key.to_bytes()) == 24
    assert Key.from_bytes(key.to_bytes()) == key


@pytest.mark.parametrize("text", ["", "short", "A" * 31, "A" * 33, "A" * 31 + "=", "é" * 32])
def test_malformed_key_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="key"):
        LICENSES[2].decrypt(text)


def test_key_of_another_licence_is_not_accepted() -> None:
    assert not LICENSES[1].made(LICENSES[1].decrypt(VECTORS[2]["secret"]))


class TestLicenses:
    def test_new_licence_has_version_3_and_is_parsed(self) -> None:
        license = License.new()
        assert license.version == 3
        assert license.text.endswith(":3")
        assert License.parse(license.text) == license
        key = license.decrypt(license.secret_key())
        assert key.is_secret
        assert license.made(key)
        assert (key.path, key.target, key.expires) == (0, 0, 0)
        assert License.new().text != license.text

    def test_version_1_needs_no_suffix(self) -> None:
        text = VECTORS[0]["licence"]
        assert ":" not in text
        assert License.parse(f"{text}:1").decrypt(VECTORS[0]["secret"]).is_secret

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param("", id="empty"),
            pytest.param("AAAA", id="too short"),
            pytest.param("!" * 43, id="no base64"),
            pytest.param(VECTORS[2]["licence"][:-2], id="version 3 taken for 1"),
            pytest.param(VECTORS[2]["licence"][:-1] + "2", id="version 3 taken for 2"),
            pytest.param(VECTORS[2]["licence"][:-1] + "4", id="version 4"),
            pytest.param(VECTORS[2]["licence"][8:], id="not Snappy"),
            pytest.param(":3", id="nothing packed"),
            pytest.param("AA:3", id="an empty block"),
        ],
    )
    def test_malformed_licence_is_rejected(self, text: str) -> None:
        with pytest.raises(ValueError, match="licence"):
            License.parse(text)

    @pytest.mark.parametrize(
        "numbers", [(1, 2, 1, 1), (2**32, 1, 1), (1, 2**32, 1), (1, 1, 2**16), (1, 1)]
    )
    def test_licence_with_invalid_numbers_is_rejected(self, numbers: tuple[int, ...]) -> None:
        packed = b"\x20" + bytes(32) + b"\x10" + bytes(16)
        packed += b"".join(map(_snappy.uvarint, numbers))
        text = base64.urlsafe_b64encode(_snappy.encode(packed)).decode().rstrip("=")
        with pytest.raises(ValueError, match="licence"):
            License.parse(f"{text}:3")

    def test_repr_contains_no_secret(self) -> None:
        assert repr(LICENSES[2]) == "License(version=3)"


class TestPermissions:
    def test_letters(self) -> None:
        assert permissions("rwslpex") == 254
        assert permissions("") == 0
        assert permissions("zq r") == READ

    def test_key_allows_only_its_permissions(self) -> None:
        key = replace(LICENSES[2].blank_key(), permissions=READ | STORE)
        assert [bit for bit in range(8) if key.allows(1 << bit)] == [1, 3]
        assert not key.is_secret
        flags = MASTER, READ, WRITE, STORE, LOAD, PRESENCE, EXTEND, EXECUTE
        assert sum(flags) == 255


class TestExpiry:
    NOW = 1_700_000_000.9

    @pytest.mark.parametrize(
        ("ttl", "later", "expired"),
        [
            (0, 10**10, False),
            (3, 0, False),
            (3, 2, False),
            (3, 2.5, True),
            (3, 4, True),
            (-1, 0, True),
            (-(2**31), 0, True),
            (2**31 - 1, 2**31 - 3, False),
        ],
    )
    def test_key_expires_after_its_ttl(self, ttl: int, later: float, expired: bool) -> None:
        key = replace(LICENSES[2].blank_key(), expires=expiry(self.NOW, ttl))
        assert key.expired(self.NOW + later) is expired
        assert key.to_bytes()

    def test_key_is_valid_until_the_end_of_its_last_second(self) -> None:
        key = replace(LICENSES[2].blank_key(), expires=expiry(self.NOW, 3))
        assert not key.expired(1_700_000_003)
        assert key.expired(1_700_000_003.001)

    def test_expiry_is_limited_to_32_bits(self) -> None:
        assert expiry(2**33, 1) == 2**32 - 1


class TestTargets:
    @pytest.mark.parametrize("target", ["", "a", "a/b"])
    def test_target_without_trailing_slash_is_refused(self, target: str) -> None:
        with pytest.raises(RefusedError, match="channel should end"):
            LICENSES[2].blank_key().with_target(target)

    def test_target_of_more_than_23_levels_is_refused(self) -> None:
        key = LICENSES[2].blank_key()
        assert key.with_target("a/" * 23).opens("a/" * 23)
        assert key.with_target("a/" * 23 + "#/").opens("a/" * 30)
        for target in ("a/" * 24, "a/" * 24 + "#/"):
            with pytest.raises(RefusedError, match="more than 23 parts"):
                key.with_target(target)

    @pytest.mark.parametrize(
        ("target", "opened", "closed"),
        [
            ("a/b/", "a/b/ a/b/#/", "a/ a/b/c/ b/a/ a/+/ +/b/ a/c/ a/#/"),
            ("a/#/", "a/ a/b/ a/b/c/ a/+/ a/#/ a/+/c/", "b/ +/ b/a/ #/"),
            ("#/", "a/ a/b/ +/ #/ $share/g/a/ +/a/", ""),
            ("+/", "a/ +/ b/", "a/b/"),
            ("+/b/", "a/b/ +/b/", "a/ a/c/ a/b/c/ a/+/"),
            ("+/b/#/", "a/b/ a/b/c/ +/b/+/", "a/ a/c/b/"),
            ("a/+/c/", "a/b/c/ a/+/c/", "a/b/ a/b/d/ +/b/c/ a/b/c/d/"),
            ("a/+/", "", "a/ a/b/ a/+/ a/b/c/"),
            ("+/#/", "+/ +/a/", "a/ a/b/"),
            ("$share/g/a/", "$share/g/a/", "a/ $share/h/a/"),
        ],
    )
    def test_channels_of_a_key(self, target: str, opened: str, closed: str) -> None:
        key = LICENSES[2].blank_key().with_target(target)
        assert [channel for channel in opened.split() if not key.opens(channel)] == []
        assert [channel for channel in closed.split() if key.opens(channel)] == []

    def test_key_for_channels_of_more_than_23_levels(self) -> None:
        key = LICENSES[2].blank_key().with_target("a/#/")
        assert key.opens("a/" + "b/" * 40)
        assert not LICENSES[2].blank_key().with_target("+/").opens("b/" * 40)


class TestCiphers:
    def test_xtea_published_vector(self) -> None:
        key = bytes(range(16))
        wire = bytes.fromhex("497df3d072612cb5")
        assert _xtea.encrypt(key, b"ABCDEFGH") == wire
        assert _xtea.decrypt(key, wire) == b"ABCDEFGH"

    @given(st.binary(min_size=16, max_size=16), st.binary(min_size=24, max_size=24))
    def test_xtea_decrypts_its_output(self, key: bytes, data: bytes) -> None:
        assert _xtea.decrypt(key, _xtea.encrypt(key, data)) == data

    def test_salsa20_specified_vector(self) -> None:
        """Source: the second example in section 9 of the specification."""
        key = bytes(range(1, 17)) + bytes(range(201, 217))
        assert _salsa20.block(key, bytes(range(101, 117))).hex() == (
            "45254427290f6bc1ff8b7a06aae9d9625990b66a1533c841ef31de22d772287e"
            "68c507e1c5991f02664e4cb054f5f6b8b1a0858206489577c0c384ecea67f64a"
        )
