"""A client that was left is freed by reference counting, without the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import anyio
import pytest

from emitter_anyio import ConnectError
from emitter_anyio.testing import Broker
from tests.support.connections import connect_reconnecting

MAX_OBJECTS_IN_CYCLES = 40


@pytest.fixture
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.virtual_time
@pytest.mark.parametrize("outage", [0, 60], ids=["short", "with failed tries"])
async def test_lost_connection_is_freed_when_the_client_has_reconnected(
    no_collections: None, broker: Broker, outage: float
) -> None:
    async with connect_reconnecting(connectable=broker.connectable()) as emitter:
        for _ in range(2):
            lost = weakref.ref(emitter._slot.connection)
            await broker.stop()
            await anyio.sleep(outage)
            await broker.restart()
            await anyio.sleep(60)
            assert emitter.connection is not None
            assert isinstance(emitter.connection.last_error, ConnectError if outage else EOFError)
            assert lost() is None


async def test_client_is_freed_on_exit_without_garbage_collection(
    no_collections: None, broker: Broker
) -> None:
    key = broker.keygen("a/#/", "rwp")
    emitter = connect_reconnecting(broker.url)
    emitter.on("message", lambda message: None)
    async with emitter:
        connection = emitter._slot.connection
        assert connection is not None
        parts = [
            connection,
            connection.session,
            connection._transport,
            connection._codec,
            connection._codec._engine._client,
        ]
        async with emitter.subscribe(key, "a/") as messages, emitter.watch_presence(key, "a/"):
            await emitter.publish(key, "a/", "x", qos=1)
            parts += [await messages.receive(), messages]
        alive = [weakref.ref(part) for part in parts if type(part).__weakrefoffset__]
        del connection, messages, parts
    del emitter
    assert [type(part()).__name__ for part in alive if part() is not None] == []
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    library_objects = [
        thing
        for thing in gc.garbage
        if type(thing).__module__.startswith("emitter_anyio")
        and not type(thing).__module__.startswith("emitter_anyio.testing")
    ]
    assert len(library_objects) <= MAX_OBJECTS_IN_CYCLES, library_objects
