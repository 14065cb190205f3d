from __future__ import annotations

import contextlib
import json
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio._values.messages import (
    EmitterMessage,
    Payload,
    Readable,
    StoredMessage,
    encode_payload,
)
from emitter_anyio._values.will import Will

WHEN = datetime(2024, 2, 3, 4, 5, 6, tzinfo=UTC)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
objects = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner | texts) | st.dictionaries(texts, inner | texts),
    max_leaves=12,
)


def message(binary: bytes, channel: str = "a/b/") -> EmitterMessage:
    return EmitterMessage(channel, binary)


def stored(binary: bytes, channel: str = "a/b/") -> StoredMessage:
    return StoredMessage(b"\xf0" * 16, WHEN, channel, binary)


both = pytest.mark.parametrize("make", [message, stored])


class TestDecoding:
    @both
    def test_as_binary_returns_the_payload(self, make: Any) -> None:
        binary = b"\x00\xff"
        assert make(binary).as_binary() is binary
        assert make(binary).binary is binary

    @given(texts)
    def test_as_string_decodes_text(self, text: str) -> None:
        assert message(text.encode()).as_string() == text

    @both
    def test_as_string_rejects_bad_utf8(self, make: Any) -> None:
        with pytest.raises(ValueError, match=r"7 bytes.*'a/b/'.*UTF-8.*6"):
            make(b"secret\xff").as_string()

    @given(objects)
    def test_as_object_decodes_json(self, value: object) -> None:
        assert message(json.dumps(value).encode()).as_object() == value

    @both
    @pytest.mark.parametrize(
        "binary", [b"", b"secret", b'{"secret":', b'"\xff"', b"[" * 65536, b"1" * 5000]
    )
    def test_as_object_rejects_bad_json(self, make: Any, binary: bytes) -> None:
        with pytest.raises(ValueError, match=f"{len(binary)} bytes.*'a/b/'.*JSON"):
            make(binary).as_object()

    @given(st.binary(max_size=40))
    def test_any_bytes_decode_or_raise_value_error(self, binary: bytes) -> None:
        for read in (message(binary).as_string, message(binary).as_object):
            with contextlib.suppress(ValueError):
                read()

    @pytest.mark.parametrize("read", ["as_string", "as_object"])
    def test_error_does_not_show_the_payload(self, read: str) -> None:
        with pytest.raises(ValueError, match="bytes") as caught:
            getattr(message(b"password\xff"), read)()
        assert "password" not in str(caught.value)

    @both
    def test_names_of_the_original_sdk(self, make: Any) -> None:
        one = make(b'{"n":1}')
        assert one.asBinary() == one.as_binary()
        assert one.asString() == one.as_string()
        assert one.asObject() == one.as_object()


class TestValues:
    def test_message_is_slotted(self) -> None:
        with pytest.raises(AttributeError):
            message(b"").other = 1  # type: ignore[attr-defined]  # on purpose
        assert not hasattr(message(b""), "__dict__")
        assert issubclass(EmitterMessage, Readable)

    def test_stored_message_is_frozen_and_slotted(self) -> None:
        one = stored(b"x")
        with pytest.raises(FrozenInstanceError):
            one.channel = "b/"  # type: ignore[misc]  # on purpose
        assert not hasattr(one, "__dict__")
        assert one == stored(b"x")
        assert one != stored(b"y")

    def test_will_is_frozen_and_hides_its_key(self) -> None:
        will = Will("secret", "a/", "private", retain=True)
        with pytest.raises(FrozenInstanceError):
            will.retain = False  # type: ignore[misc]  # on purpose
        assert repr(will) == "Will(key=…, channel='a/', retain=True)"
        assert not Will("secret", "a/", "x").retain

    def test_repr_of_a_reply_shows_no_key(self) -> None:
        answer = EmitterMessage("emitter/keygen/", b'{"status":200,"key":"private"}')
        assert repr(answer) == "<EmitterMessage channel='emitter/keygen/' binary=<30 bytes>>"

    def test_repr(self) -> None:
        assert repr(message(b"x")) == "<EmitterMessage channel='a/b/' binary=b'x'>"
        assert repr(stored(b"x")) == (
            "<StoredMessage time=2024-02-03T04:05:06Z channel='a/b/' binary=b'x'>"
        )

    @both
    def test_repr_is_truncated(self, make: Any) -> None:
        assert repr(make(b"x" * 64)).endswith("binary=b'" + "x" * 64 + "'>")
        assert repr(make(b"x" * 65)).endswith("binary=b'" + "x" * 64 + "'…>")


class TestEncodePayload:
    @given(objects)
    def test_object_round_trip(self, value: Any) -> None:
        binary = encode_payload(value)
        assert message(binary).as_object() == value
        assert type(binary) is bytes

    @given(texts)
    def test_text_round_trip(self, text: str) -> None:
        assert message(encode_payload(text)).as_string() == text

    @given(texts)
    def test_text_in_an_object_round_trip(self, text: str) -> None:
        assert message(encode_payload([text])).as_object() == [text]

    @given(st.binary())
    def test_bytes_round_trip(self, binary: bytes) -> None:
        for value in (binary, bytearray(binary), memoryview(binary)):
            assert encode_payload(value) == binary

    def test_bytes_are_not_copied(self) -> None:
        binary = b"x" * 100
        assert encode_payload(binary) is binary

    @pytest.mark.parametrize("view", [False, True])
    def test_mutable_buffer_is_copied(self, view: bool) -> None:
        buffer = bytearray(b"before")
        binary = encode_payload(memoryview(buffer) if view else buffer)
        buffer[:] = b"after!"
        assert binary == b"before"

    def test_json_is_compact_and_readable(self) -> None:
        assert encode_payload({"a": [1, "ü"]}) == '{"a":[1,"ü"]}'.encode()

    @pytest.mark.parametrize("value", [{1, 2}, object(), 1j, [WHEN], {"a": b"x"}])
    def test_unserializable_value_raises_type_error(self, value: Payload) -> None:
        with pytest.raises(TypeError, match=f"{type(value).__name__} as JSON"):
            encode_payload(value)

    def test_value_without_json_raises_value_error(self) -> None:
        loop: list[object] = []
        loop.append(loop)
        deep: list[object] = []
        for _ in range(100_000):
            deep = [deep]
        for value in (float("nan"), float("inf"), [float("-inf")], loop, deep):
            with pytest.raises(ValueError, match="JSON"):
                encode_payload(value)

    @pytest.mark.parametrize("value", ["ab\ud800", ["\ud800"]])
    def test_lone_surrogate_raises_value_error(self, value: Payload) -> None:
        with pytest.raises(ValueError, match=r"UTF-8.* 2"):
            encode_payload(value)
