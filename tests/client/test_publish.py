from __future__ import annotations

import json
import logging
from typing import Any, Literal

import anyio
import pytest

from emitter_anyio import (
    Emitter,
    InvalidChannelError,
    MessageTooLargeError,
    RequestError,
    UnauthorizedError,
)
from tests.client.tools import Calls, arrived, checkpoints
from tests.support.logs import logged
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32
QOS: tuple[Literal[0, 1], ...] = (0, 1)


@pytest.mark.parametrize("qos", QOS)
@pytest.mark.parametrize(
    ("message", "binary"),
    [
        pytest.param("grüß dich", "grüß dich".encode(), id="text"),
        pytest.param(b"\x00\xff", b"\x00\xff", id="bytes"),
        pytest.param(bytearray(b"\x01\x02"), b"\x01\x02", id="bytearray"),
        pytest.param(memoryview(b"abcdef")[::2], b"ace", id="memoryview"),
        pytest.param(b"", b"", id="no bytes"),
        pytest.param("", b"", id="no text"),
    ],
)
async def test_bytes_and_text_arrive_unchanged(
    emitter: Emitter, key: str, unique: str, message: Any, binary: bytes, qos: Literal[0, 1]
) -> None:
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, unique, message, qos=qos)
        received = await messages.receive()
    assert received.channel == unique
    assert received.binary == binary


@pytest.mark.parametrize("value", [{"ä": [1, 2.5, None]}, ["x"], 42, True, None], ids=json.dumps)
async def test_other_values_arrive_as_json(
    emitter: Emitter, key: str, unique: str, value: object
) -> None:
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, unique, value)
        assert (await messages.receive()).as_object() == value


@pytest.mark.parametrize(
    ("message", "kind", "pattern"),
    [
        ({1, 2}, TypeError, "set"),
        (float("nan"), ValueError, "JSON"),
        ("\ud800", ValueError, "UTF-8"),
    ],
)
async def test_message_that_cannot_be_encoded_is_rejected(
    emitter: Emitter, unique: str, message: object, kind: type[Exception], pattern: str
) -> None:
    with pytest.raises(kind, match=pattern):
        await emitter.publish(NO_KEY, unique, message)


async def test_missing_slash_is_added(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, unique.rstrip("/"), "m")
        assert (await messages.receive()).channel == unique


async def test_another_client_receives_the_message(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with other.subscribe(key, unique) as messages:
        await emitter.publish(key, unique, "to the other")
        assert (await messages.receive()).as_string() == "to the other"


async def test_messages_of_mixed_qos_arrive_in_the_order_of_the_calls(
    emitter: Emitter, key: str, unique: str
) -> None:
    expected = [str(number) for number in range(20)]
    async with emitter.subscribe(key, unique) as messages, anyio.create_task_group() as tasks:
        for number in expected:
            # One task each, so that a publish with qos=1 does not delay the next call.
            tasks.start_soon(publish, emitter, key, unique, number)
            await checkpoints()
        assert [(await messages.receive()).as_string() for _ in expected] == expected


async def publish(emitter: Emitter, key: str, channel: str, number: str) -> None:
    await emitter.publish(key, channel, number, qos=1 if int(number) % 2 else 0)


# ttl, retain, echo


async def test_message_with_a_ttl_is_stored(emitter: Emitter, key: str, unique: str) -> None:
    for number in ("1", "2", "3"):
        await emitter.publish(key, unique, number, ttl=60, qos=1)
    async with emitter.subscribe(key, unique, last=10) as messages:
        # Within one second, the broker replays the newest message first.
        assert sorted(await arrived(emitter, messages)) == ["1", "2", "3"]


async def test_ttl_can_be_positional(emitter: Emitter, key: str, unique: str) -> None:
    await emitter.publish(key, unique, "stored", 60)
    async with emitter.subscribe(key, unique) as messages:
        assert (await messages.receive()).as_string() == "stored"


@pytest.mark.parametrize("ttl", [None, 0])
async def test_message_without_a_ttl_is_not_stored(
    emitter: Emitter, key: str, unique: str, ttl: int | None
) -> None:
    await emitter.publish(key, unique, "passing", ttl, qos=1)
    async with emitter.subscribe(key, unique, last=10) as messages:
        assert await arrived(emitter, messages) == []


@pytest.mark.parametrize("ttl", [-1, 2**31, 1.5, "60"])
async def test_bad_ttl_is_rejected(emitter: Emitter, unique: str, ttl: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="ttl"):
        await emitter.publish(NO_KEY, unique, "m", ttl)


async def test_retained_message_is_stored(emitter: Emitter, key: str, unique: str) -> None:
    await emitter.publish(key, unique, "kept", retain=True, qos=1)
    async with emitter.subscribe(key, unique) as messages:
        assert (await messages.receive()).as_string() == "kept"


async def test_message_without_store_permission_is_delivered_and_not_stored(
    emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    created = await emitter.keygen(server.secret, unique, "rwl")
    async with emitter.subscribe(created.key, unique) as messages:
        await emitter.publish(created.key, unique, "m", ttl=60, qos=1)
        assert await arrived(emitter, messages) == ["m"]
    async with emitter.subscribe(created.key, unique, last=10) as messages:
        assert await arrived(emitter, messages) == []


@pytest.mark.parametrize("qos", QOS)
async def test_message_without_echo_reaches_only_other_clients(
    emitter: Emitter, other: Emitter, key: str, unique: str, qos: Literal[0, 1]
) -> None:
    async with emitter.subscribe(key, unique) as own, other.subscribe(key, unique) as theirs:
        await emitter.publish(key, unique, "m", echo=False, qos=qos)
        assert (await theirs.receive()).as_string() == "m"
        assert await arrived(emitter, own) == []


# Refusals


async def test_refused_publish_with_qos_1_raises(emitter: Emitter, unique: str) -> None:
    with pytest.raises(UnauthorizedError) as caught:
        await emitter.publish(NO_KEY, unique, "m", qos=1)
    error = caught.value
    assert (error.status, error.operation, error.channel) == (401, "publish", unique)
    assert error.hint is not None
    assert "'w'" in error.hint
    assert NO_KEY not in f"{error} {error!r} {error.hint}"


async def test_key_of_the_wrong_length_gets_a_hint(emitter: Emitter, unique: str) -> None:
    with pytest.raises(UnauthorizedError, match="32") as caught:
        await emitter.publish("shortkey", unique, "m", qos=1)
    assert "shortkey" not in str(caught.value)


async def test_key_without_write_permission_is_refused(
    emitter: Emitter, server: Server, unique: str
) -> None:
    created = await emitter.keygen(server.secret, unique, "r")
    with pytest.raises(UnauthorizedError, match="'w' \\(write\\)"):
        await emitter.publish(created.key, unique, "m", qos=1)


async def test_key_for_another_channel_is_refused(emitter: Emitter, key: str, unique: str) -> None:
    with pytest.raises(UnauthorizedError, match="channel"):
        await emitter.publish(key, f"not{unique}", "m", qos=1)


async def test_client_works_after_a_refusal(emitter: Emitter, key: str, unique: str) -> None:
    with pytest.raises(RequestError):
        await emitter.publish(NO_KEY, unique, "m", qos=1)
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, unique, "m", qos=1)
        assert await arrived(emitter, messages) == ["m"]


async def test_qos_2_raises_value_error(emitter: Emitter, key: str, unique: str) -> None:
    with pytest.raises(ValueError, match=r"qos.*0 or 1.*2"):
        await emitter.publish(key, unique, "m", qos=2)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize(
    ("channel", "pattern"),
    [
        ("", "empty"),
        ("/", "empty"),
        ("/a/", "empty level"),
        ("a//b/", "empty level"),
        ("a b/", "' '"),
        ("straße/", "'ß'"),
        ("a/?ttl=5", "'\\?'"),
        ("a/+/", "wildcard '\\+'"),
        ("a/#/", "wildcard '#'"),
    ],
)
async def test_bad_channel_is_rejected_with_a_reason(
    emitter: Emitter, channel: str, pattern: str
) -> None:
    with pytest.raises(InvalidChannelError, match=pattern) as caught:
        await emitter.publish(NO_KEY, channel, "m")
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("bad", ["", "with/slash", "with space", "with#hash", "ä"])
async def test_key_that_is_invalid_in_a_topic_is_rejected_and_not_shown(
    emitter: Emitter, unique: str, bad: str
) -> None:
    with pytest.raises(ValueError, match="key") as caught:
        await emitter.publish(bad, unique, "m")
    assert len(bad) < 2 or bad not in str(caught.value)


@pytest.mark.parametrize("qos", QOS)
async def test_largest_message_arrives_and_a_larger_one_is_rejected(
    emitter: Emitter, key: str, unique: str, qos: Literal[0, 1]
) -> None:
    largest = 65536 - 2 - len(f"{key}/{unique}") - 2 * qos
    with pytest.raises(MessageTooLargeError, match="65537 bytes"):
        await emitter.publish(key, unique, bytes(largest + 1), qos=qos)
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, unique, bytes(largest), qos=qos)
        assert len((await messages.receive()).binary) == largest


# flush() and refused publishes with qos=0


async def test_flush_returns_the_round_trip_after_the_broker_read_everything(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique) as messages:
        for _ in range(5):
            await emitter.publish(key, unique, "m")
        assert await emitter.flush() > 0
        assert messages.statistics().current_buffer_used == 5


async def test_flush_raises_the_first_refusal_since_the_last_flush_once(
    emitter: Emitter, key: str, unique: str
) -> None:
    await emitter.publish(key, unique, "fine")
    await emitter.publish(NO_KEY, unique, "refused")
    await emitter.publish("short", unique, "refused too")
    with pytest.raises(UnauthorizedError) as caught:
        await emitter.flush()
    assert (caught.value.status, caught.value.operation) == (401, "publish")
    assert await emitter.flush() > 0


async def test_flush_does_not_raise_a_refusal_again(emitter: Emitter, unique: str) -> None:
    with pytest.raises(UnauthorizedError):
        await emitter.publish(NO_KEY, unique, "m", qos=1)
    assert await emitter.flush() > 0


async def test_refused_publish_with_qos_0_goes_to_the_error_handler(
    emitter: Emitter, unique: str
) -> None:
    errors = Calls()
    emitter.on("error", errors)
    await emitter.publish(NO_KEY, unique, "m")
    (error,) = await errors.get(1)
    assert isinstance(error, UnauthorizedError)
    assert error.operation == "publish"


async def test_refused_publish_with_qos_0_is_logged_with_advice_without_an_error_handler(
    emitter: Emitter, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    await emitter.publish(NO_KEY, unique, "m")
    with pytest.raises(UnauthorizedError):
        await emitter.flush()
    (warning,) = logged(caplog, logging.WARNING)
    assert warning.name == "emitter_anyio"
    assert "qos=1" in warning.getMessage()
    assert "flush()" in warning.getMessage()
