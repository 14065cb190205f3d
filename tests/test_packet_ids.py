"""Calls wait while all packet ids are in use."""

from __future__ import annotations

from functools import partial

import anyio
import pytest

from emitter_anyio import Emitter, RequestTimeoutError, connect
from emitter_anyio.testing import Broker
from tests.support.connections import connect_reconnecting


@pytest.fixture(autouse=True)
def two_packet_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emitter_anyio._protocol.session._RESERVED_PACKET_IDS", 65535 - 2)


async def expect_timeout(emitter: Emitter, key: str, text: str) -> None:
    with pytest.raises(RequestTimeoutError):
        await emitter.publish(key, "a/", text, qos=1)


@pytest.mark.parametrize("request_timeout", [10, None])
async def test_publish_waits_for_free_packet_id(
    broker: Broker, request_timeout: float | None
) -> None:
    key = broker.keygen("a/")
    async with connect(broker.url, request_timeout=request_timeout) as emitter:
        async with anyio.create_task_group() as tasks:
            with broker.hold("puback"):
                for text in "xyz":
                    tasks.start_soon(partial(emitter.publish, key, "a/", text, qos=1))
                await anyio.wait_all_tasks_blocked()
                assert emitter.statistics().pending == 2
        assert emitter.statistics().pending == 0


@pytest.mark.virtual_time
async def test_connection_is_replaced_if_the_broker_never_acknowledges(broker: Broker) -> None:
    key = broker.keygen("a/", "rw")
    async with connect_reconnecting(connectable=broker.connectable()) as emitter:
        with broker.lose("puback"):
            for text in "xy":
                await expect_timeout(emitter, key, text)
        await emitter.publish(key, "a/", "z", qos=1)
        assert emitter.connection is not None
        error = emitter.connection.last_error
        assert str(error) == "no packet id is free: the broker acknowledges nothing"


@pytest.mark.virtual_time
async def test_connection_is_kept_while_a_full_stream_delays_acknowledgements(
    broker: Broker,
) -> None:
    key = broker.keygen("a/", "rw")
    async with (
        connect_reconnecting(connectable=broker.connectable()) as emitter,
        emitter.subscribe(key, "a/", buffer=1, overflow="block") as messages,
    ):
        async with anyio.create_task_group() as tasks:
            with broker.hold("puback"):
                for text in "xy":
                    await broker.publish("a/", text)
                    tasks.start_soon(expect_timeout, emitter, key, text)
                await anyio.sleep(60)
                tasks.start_soon(partial(emitter.publish, key, "a/", "z", qos=1))
                await anyio.sleep(60)
            async for message in messages:
                if message.as_string() == "z":
                    break
        assert emitter.connection is not None
        assert emitter.connection.last_error is None
