"""reconnect() when calls get no reply, no server can be reached, or there is no connection."""

from __future__ import annotations

import logging

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import Backoff, ConnectionLostError, Emitter, connect
from emitter_anyio.testing import Broker
from tests.support.connections import connect_reconnecting, while_disconnected
from tests.support.logs import logged


async def test_call_without_reply_raises_after_the_timeout(broker: Broker, key: str) -> None:
    caught: list[Exception] = []

    async def publish(emitter: Emitter) -> None:
        try:
            await emitter.publish(key, "a/", "x", qos=1)
        except ConnectionLostError as exc:
            caught.append(exc)

    async with connect_reconnecting(broker.url, disconnect_timeout=0.05) as emitter:
        async with anyio.create_task_group() as tasks:
            with broker.hold("puback"):
                tasks.start_soon(publish, emitter)
                await emitter.flush()
                await emitter.reconnect()
        await emitter.publish(key, "a/", "y", qos=1)
    (error,) = caught
    assert str(error).endswith(
        "before the reply: reconnect() was called; whether the call took effect is unknown"
    )


async def test_calls_in_between_wait_for_the_next_connection(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    done: list[str] = []

    async def publish(qos: int) -> None:
        await emitter.publish(key, "a/", "new", qos=1 if qos else 0)
        done.append(f"new {qos}")

    async def pend() -> None:
        await emitter.publish(key, "a/", "old", qos=1)
        done.append("old")

    async with anyio.create_task_group() as tasks:
        with broker.hold("puback"):
            tasks.start_soon(pend)
            await emitter.flush()
            tasks.start_soon(emitter.reconnect)
            await anyio.wait_all_tasks_blocked()
            assert emitter.state == "connecting"
            for qos in (0, 1):
                tasks.start_soon(publish, qos)
            await anyio.wait_all_tasks_blocked()
            assert done == []
    assert sorted(done) == ["new 0", "new 1", "old"]
    assert emitter.statistics().connections == 2


async def test_calls_in_between_raise_if_they_are_not_to_wait(broker: Broker, key: str) -> None:
    async with connect_reconnecting(broker.url, while_down="raise") as emitter:
        async with anyio.create_task_group() as tasks:
            with broker.hold("puback"):
                tasks.start_soon(lambda: emitter.publish(key, "a/", "old", qos=1))
                await emitter.flush()
                tasks.start_soon(emitter.reconnect)
                await anyio.wait_all_tasks_blocked()
                for qos in (0, 1):
                    with pytest.raises(ConnectionLostError):
                        await emitter.publish(key, "a/", "new", qos=1 if qos else 0)
        await emitter.publish(key, "a/", "newer", qos=1)


@pytest.mark.fast_path  # Paho reads nothing after it has written DISCONNECT
async def test_messages_that_were_on_the_way_arrive(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.subscribe(key, "a/", last=0) as messages:
        for number in range(100):
            await broker.publish("a/", str(number))
        await emitter.reconnect()
        assert messages.statistics().current_buffer_used == 100


async def test_giving_up_raises(broker: Broker) -> None:
    with pytest.raises(ConnectionLostError) as caught:
        async with connect(broker.url, reconnect=Backoff(0.001, 0.01, tries=2)) as emitter:
            with broker.refuse():
                await emitter.reconnect()
    assert "could not reconnect in 2 tries" in str(caught.value)


async def test_successful_calls_do_not_use_up_the_tries(broker: Broker) -> None:
    async with connect(broker.url, reconnect=Backoff(0.001, 0.01, tries=1)) as emitter:
        for _ in range(5):
            await emitter.reconnect()
        assert emitter.statistics().connections == 6


async def test_without_a_connection_it_waits_for_the_next_one(
    broker: Broker, emitter: Emitter
) -> None:
    async with anyio.create_task_group() as tasks:
        async with while_disconnected(emitter, broker):
            tasks.start_soon(emitter.reconnect)
            await anyio.wait_all_tasks_blocked()
    assert emitter.statistics().connections == 2


async def test_a_connection_that_is_being_restored_is_replaced(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.subscribe(key, "a/", last=0), anyio.create_task_group() as tasks:
        with broker.hold("suback"):
            async with emitter.stream("disconnect") as disconnected:
                await broker.drop()
                await disconnected.receive()
            while not any(client.subscriptions for client in broker.clients):
                await checkpoint()
            tasks.start_soon(emitter.reconnect)
            await anyio.wait_all_tasks_blocked()
    assert emitter.statistics().connections == 3


async def test_the_connection_can_be_lost_during_it(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    caught: list[Exception] = []

    async def publish() -> None:
        try:
            await emitter.publish(key, "a/", "x", qos=1)
        except ConnectionLostError as exc:
            caught.append(exc)

    async with anyio.create_task_group() as tasks:
        with broker.hold("puback"):
            tasks.start_soon(publish)
            await emitter.flush()
            tasks.start_soon(emitter.reconnect)
            await anyio.wait_all_tasks_blocked()
            await broker.drop()
    assert len(caught) == 1
    assert emitter.statistics().connections == 2


async def test_a_stalled_consumer_does_not_stop_it(broker: Broker, key: str) -> None:
    async with connect_reconnecting(broker.url, disconnect_timeout=0.05) as emitter:
        async with emitter.subscribe(key, "a/", last=0, buffer=1, overflow="block") as messages:
            for number in range(5):
                await broker.publish("a/", str(number))
            await messages.receive()
            await emitter.reconnect()
            assert emitter.state == "connected"


async def test_it_is_not_logged_as_a_warning(
    broker: Broker, emitter: Emitter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "emitter_anyio")
    await emitter.reconnect()
    texts = [record.getMessage() for record in logged(caplog)]
    assert any(text.endswith("reconnect() was called") for text in texts)
    assert logged(caplog, logging.WARNING) == []
