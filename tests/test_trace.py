"""The ``trace=`` hook."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final

import anyio
import pytest

from emitter_anyio import ConnectError, Emitter, RequestError, UnauthorizedError
from emitter_anyio.testing import Broker
from tests.support.connections import connect_once, connect_reconnecting, while_disconnected


class RecordingHook:
    """A hook that records its calls."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Mapping[str, object]]] = []

    def __call__(self, name: str, values: Mapping[str, object]) -> None:
        self.events.append((name, values))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def values(self, name: str) -> list[Mapping[str, object]]:
        return [values for each, values in self.events if each == name]


async def test_connect_publish_and_deliver_are_traced(broker: Broker) -> None:
    trace, key = RecordingHook(), broker.keygen("a/", "rw")
    async with connect_reconnecting(broker.url, trace=trace) as emitter:
        async with emitter.subscribe(key, "a/") as messages:
            await emitter.publish(key, "a/", "four")
            await messages.receive()
            await emitter.publish(key, "a/", "four", qos=1)
            await messages.receive()
    assert trace.names[:2] == ["connect.started", "connect.complete"]
    publishes = trace.values("publish.complete")
    assert [(each["channel"], each["qos"], each["size"]) for each in publishes] == [
        ("a/", 0, 4),
        ("a/", 1, 4),
    ]
    for name in ("connect.complete", "publish.complete", "deliver.complete"):
        for values in trace.values(name):
            assert isinstance(seconds := values["seconds"], float)
            assert seconds >= 0
    assert key not in repr(trace.events)


async def test_reconnect_is_traced(broker: Broker) -> None:
    trace = RecordingHook()
    async with connect_reconnecting(broker.url, trace=trace) as emitter:
        async with while_disconnected(emitter, broker):
            pass
    assert trace.names.count("connect.complete") == 1
    assert trace.names.count("reconnect.complete") == 1


async def test_failed_connect_is_traced(anyio_backend: object) -> None:
    trace = RecordingHook()
    with suppress(ConnectError):
        async with connect_once("mqtt://127.0.0.1:1", trace=trace):
            raise AssertionError("entered")
    assert trace.names == ["connect.started", "connect.failed"]
    assert isinstance(trace.values("connect.failed")[0]["error"], ConnectError)


async def test_refusals_are_traced(broker: Broker) -> None:
    trace = RecordingHook()
    async with connect_once(broker.url, trace=trace) as emitter:
        with pytest.raises(UnauthorizedError):
            await emitter.publish("x" * 32, "a/", "x", qos=1)
        await emitter.publish("x" * 32, "a/", "x")
        with pytest.raises(UnauthorizedError):
            await emitter.flush()
    refused = trace.values("refused")
    assert [values["status"] for values in refused] == [401, 401]
    assert [values["operation"] for values in refused] == ["publish", "publish"]


REFUSED: Final[dict[str, Callable[[Emitter, str], Awaitable[object]]]] = {
    "keygen": lambda emitter, key: emitter.keygen(key, "a/"),
    "keyban": lambda emitter, key: emitter.keyban(key, "k" * 32),
    "presence": lambda emitter, key: emitter.presence(key, "a/"),
    "history": lambda emitter, key: anext(emitter.history(key, "a/")),
    "subscribe": lambda emitter, key: emitter.subscribe(key, "a/"),
}


@pytest.mark.parametrize("operation", REFUSED)
async def test_refusal_of_each_request_is_traced_once(broker: Broker, operation: str) -> None:
    trace = RecordingHook()
    async with connect_once(broker.url, trace=trace) as emitter:
        with pytest.raises(RequestError) as caught:
            await REFUSED[operation](emitter, "x" * 32)
    (refused,) = trace.values("refused")
    assert refused["operation"] == operation
    assert refused["status"] == caught.value.status
    assert refused["channel"] == (None if operation == "keyban" else "a/")


async def test_refusal_that_no_call_awaits_is_traced(broker: Broker) -> None:
    trace, key = RecordingHook(), broker.keygen("a/", "p")
    async with connect_once(broker.url, trace=trace) as emitter, emitter.stream("error") as errors:
        with broker.hold("reply", "error", "puback"), anyio.move_on_after(0.1):
            await emitter.presence("x" * 32, "a/")
        await errors.receive()
    assert [values["operation"] for values in trace.values("refused")] == ["presence"]
    assert key not in repr(trace.events)


async def test_dropped_messages_are_traced(broker: Broker) -> None:
    trace, key = RecordingHook(), broker.keygen("a/", "rw")
    async with connect_once(broker.url, trace=trace) as emitter:
        async with emitter.subscribe(key, "a/", buffer=1, overflow="drop_newest") as messages:
            for _ in range(3):
                await emitter.publish(key, "a/", "x", qos=1)
            await emitter.flush()
            assert messages.statistics().dropped == 2
    assert len(trace.values("dropped")) == 2


async def test_exception_of_the_hook_is_logged(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    def trace(name: str, values: Mapping[str, object]) -> None:
        raise ZeroDivisionError

    async with connect_once(broker.url, trace=trace) as emitter:
        await emitter.flush()
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert any("connect.started" in record.getMessage() for record in errors)


async def test_cancelled_publish_is_traced_as_failed(broker: Broker) -> None:
    trace, key = RecordingHook(), broker.keygen("a/", "rw")
    async with connect_once(broker.url, trace=trace) as emitter:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await emitter.publish(key, "a/", "x", qos=1)
        await emitter.publish(key, "a/", "x", qos=1)
    assert [name for name in trace.names if name.startswith("publish")] == [
        "publish.started",
        "publish.failed",
        "publish.started",
        "publish.complete",
    ]


async def test_trace_can_be_none(broker: Broker) -> None:
    async with connect_once(broker.url, trace=None) as emitter:
        await emitter.flush()


@pytest.mark.parametrize("hook", [1, "trace"])
def test_trace_must_be_callable(hook: object) -> None:
    with pytest.raises(TypeError, match="trace"):
        connect_once("mqtt://h", trace=hook)
