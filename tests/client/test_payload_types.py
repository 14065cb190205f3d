"""Typed payloads: as_type(), subscribe(decode=) and json_encoder."""

from __future__ import annotations

import dataclasses
import logging
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, assert_type

import anyio
import msgspec
import pydantic
import pytest

from emitter_anyio import (
    DecodedMessage,
    DecodeError,
    Emitter,
    EmitterMessage,
    EventStream,
    Gap,
    Will,
    connect,
)
from tests.client.tools import relay
from tests.support.logs import logged
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32


class Struct(msgspec.Struct):
    id: int
    temp: float


class Model(pydantic.BaseModel):
    id: int
    temp: float


struct = msgspec.json.Decoder(Struct).decode


def integer(payload: bytes) -> int:
    return int(payload)


# as_type()


async def test_a_message_is_decoded_by_a_function(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.subscribe(key, unique, last=0) as messages:
        await emitter.publish(key, unique, {"id": 7, "temp": 21.5})
        message = await messages.receive()
    assert message.as_type(struct) == Struct(7, 21.5)
    assert message.as_type(Model.model_validate_json) == Model(id=7, temp=21.5)
    assert message.as_type(len) == len(message.binary)


async def test_a_stored_message_is_decoded_by_a_function(
    emitter: Emitter, key: str, unique: str
) -> None:
    await emitter.publish(key, unique, {"id": 7, "temp": 21.5}, ttl=60, qos=1)
    (stored,) = [one async for one in emitter.history(key, unique)]
    assert stored.as_type(struct) == Struct(7, 21.5)


def test_what_the_function_raises_is_raised() -> None:
    message = EmitterMessage("a/", b'{"id": "x"}')
    with pytest.raises(msgspec.ValidationError):
        message.as_type(struct)
    with pytest.raises(pydantic.ValidationError):
        message.as_type(Model.model_validate_json)


# subscribe(decode=)


async def test_a_stream_contains_decoded_messages(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.subscribe(key, unique, last=0, decode=struct) as readings:
        assert_type(readings, EventStream[DecodedMessage[Struct]])
        await emitter.publish(key, f"{unique}a/", {"id": 7, "temp": 21.5})
        reading = await readings.receive()
    assert_type(reading.value, Struct)
    assert isinstance(reading, DecodedMessage)
    assert isinstance(reading, EmitterMessage)
    assert reading.value == Struct(7, 21.5)
    assert reading.channel == f"{unique}a/"
    assert reading.as_object() == {"id": 7, "temp": 21.5}
    assert (reading.replayed, reading.id) == (False, None)
    assert repr(reading).startswith(f"<DecodedMessage channel='{unique}a/' binary=b'")


async def test_streams_of_one_channel_are_decoded_apart(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with (
        emitter.subscribe(key, unique, last=0, decode=Model.model_validate_json) as models,
        emitter.subscribe(key, unique, last=0) as messages,
        models.clone() as clone,
    ):
        assert_type(models, EventStream[DecodedMessage[Model]])
        assert_type(messages, EventStream[EmitterMessage])
        for number in (1, 2):
            await emitter.publish(key, unique, {"id": number, "temp": 0})
        assert (await models.receive()).value == Model(id=1, temp=0)
        assert (await clone.receive()).value == Model(id=2, temp=0)
        assert type(await messages.receive()) is EmitterMessage


async def test_a_message_that_does_not_decode_goes_to_error_and_is_counted(
    emitter: Emitter, key: str, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        emitter.stream("error") as errors,
        emitter.subscribe(key, unique, last=0, decode=integer) as numbers,
    ):
        for payload in ("1", "two", "3", "four", "5"):
            await emitter.publish(key, unique, payload)
        await emitter.flush()
        assert (await numbers.receive()).value == 1
        assert numbers.receive_nowait().value == 3
        assert (await anext(numbers)).value == 5
        for bad in (b"two", b"four"):
            error = await errors.receive()
            assert isinstance(error, DecodeError)
            assert isinstance(error, ValueError)
            assert isinstance(error.__cause__, ValueError)
            assert error.message.binary == bad
            assert error.message.channel == unique
            assert str(error).startswith(f"subscribe('{unique}'): cannot decode the message of")
            assert "ValueError: invalid literal" in str(error)
        figures = numbers.statistics()
        assert (figures.undecoded, figures.received, figures.dropped) == (2, 5, 0)
    assert logged(caplog, logging.WARNING) == []


async def test_a_message_that_does_not_decode_is_logged_if_nothing_handles_error(
    emitter: Emitter, key: str, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with emitter.subscribe(key, unique, last=0, decode=integer) as numbers:
        await emitter.publish(key, unique, "two\nlines")
        await emitter.publish(key, unique, "3")
        assert (await numbers.receive()).value == 3
    (record,) = logged(caplog, logging.WARNING)
    assert "cannot decode the message of 9 bytes" in record.getMessage()
    assert "\n" not in record.getMessage()


async def test_a_stream_ends_after_a_message_that_does_not_decode(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    async with connect(server.url) as reader:
        async with reader.subscribe(key, unique, last=0, decode=integer) as numbers:
            await emitter.publish(key, unique, "1", qos=1)
            await emitter.publish(key, unique, "x", qos=1)
            while numbers.statistics().current_buffer_used < 2:
                await reader.flush()
            await reader.disconnect()
            assert [number.value async for number in numbers] == [1]
            with pytest.raises(anyio.EndOfStream):
                await numbers.receive()
            assert numbers.statistics().undecoded == 1


async def test_gaps_are_not_decoded(server: Server, unique: str) -> None:
    async with relay(server) as proxy, connect(f"mqtt://127.0.0.1:{proxy.port}") as emitter:
        key = (await emitter.keygen(server.secret, unique, "rw")).key
        subscribing = emitter.subscribe(key, unique, last=0, decode=integer, mark_gaps=True)
        async with subscribing as numbers:
            assert_type(numbers, EventStream[DecodedMessage[int] | Gap])
            proxy.cut()
            assert isinstance(await numbers.receive(), Gap)
            await emitter.wait_connected()
            await emitter.publish(key, unique, "1")
            item = await numbers.receive()
            assert not isinstance(item, Gap)
            assert item.value == 1


async def test_resumed_messages_are_decoded(server: Server, other: Emitter, unique: str) -> None:
    async with relay(server) as proxy, connect(f"mqtt://127.0.0.1:{proxy.port}") as emitter:
        key = (await emitter.keygen(server.secret, unique, "rwsl")).key
        async with emitter.subscribe(key, unique, last=0, decode=integer, resume=True) as numbers:
            async with emitter.stream("disconnect") as losses:
                proxy.cut()
                await losses.receive()
            await other.publish(key, unique, "1", ttl=60, qos=1)
            number = await numbers.receive()
            assert number.value == 1
            assert number.replayed == (number.id is not None)


async def test_awaited_subscriptions_cannot_decode(emitter: Emitter) -> None:
    with pytest.raises(ValueError, match="as_type"):
        await emitter.subscribe(NO_KEY, "a/", decode=integer)


# json_encoder


def encode(value: object) -> object:
    if isinstance(value, Decimal | datetime):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


@dataclasses.dataclass
class Reading:
    amount: Decimal
    at: datetime


READING = Reading(Decimal("1.5"), datetime(2026, 1, 1, tzinfo=UTC))
ENCODED = {"amount": "1.5", "at": "2026-01-01 00:00:00+00:00"}


async def test_objects_that_json_does_not_know_are_encoded(
    server: Server, key: str, unique: str
) -> None:
    async with connect(server.url, json_encoder=encode) as emitter:
        async with emitter.subscribe(key, unique, last=0) as messages:
            await emitter.publish(key, unique, READING)
            await emitter.publish(key, unique, [READING], qos=1)
            await emitter.link(key, unique, "a1")
            await emitter.publish_with_link("a1", READING)
            found = [(await messages.receive()).as_object() for _ in range(3)]
        assert found == [ENCODED, [ENCODED], ENCODED]
        async with anyio.create_task_group() as tasks:
            await tasks.start(emitter.serve, key, unique, lambda request: READING)
            assert (await emitter.request(key, unique, READING)).as_object() == ENCODED
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize("encoder", [msgspec.to_builtins, lambda model: model.model_dump()])
async def test_the_encoders_of_libraries_fit(
    server: Server, key: str, unique: str, encoder: Any
) -> None:
    value = Struct(7, 1) if encoder is msgspec.to_builtins else Model(id=7, temp=1)
    async with connect(server.url, json_encoder=encoder) as emitter:
        async with emitter.subscribe(key, unique, last=0, decode=struct) as readings:
            await emitter.publish(key, unique, value)
            assert (await readings.receive()).value == Struct(7, 1)


async def test_a_will_is_encoded(server: Server, emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.subscribe(key, unique, last=0) as messages:
        async with connect(server.url, will=Will(key, unique, READING), json_encoder=encode):
            pass
        assert (await messages.receive()).as_object() == ENCODED


async def test_what_the_encoder_raises_names_the_message(server: Server) -> None:
    async with connect(server.url, json_encoder=encode) as emitter:
        with pytest.raises(TypeError, match="type object as JSON: no JSON for object"):
            await emitter.publish(NO_KEY, "a/", object())
    async with connect(server.url, json_encoder=lambda value: value) as emitter:
        with pytest.raises(ValueError, match="Circular"):
            await emitter.publish(NO_KEY, "a/", object())


@pytest.mark.parametrize("encoder", [5, "str", anyio.sleep])
def test_a_wrong_encoder_is_rejected(encoder: Any) -> None:
    with pytest.raises(TypeError, match="json_encoder must be a function"):
        connect(json_encoder=encoder)


def test_none_encodes_nothing() -> None:
    connect(json_encoder=None)
