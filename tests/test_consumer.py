"""Durable consumers when connections, processes, nodes or stored messages are lost."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from emitter_anyio import (
    Backoff,
    ConnectionLostError,
    Consumer,
    Emitter,
    RequestTimeoutError,
    UnauthorizedError,
    connect,
)
from emitter_anyio._features import forward
from emitter_anyio.testing import Broker
from emitter_anyio.testing._storage import Stored
from tests.support.connections import (
    connect_once,
    connect_reconnecting,
    force_reconnect,
    subscribed_channels,
    while_disconnected,
)

TTL = 10**6


@pytest.fixture
async def emitter(broker: Broker) -> AsyncIterator[Emitter]:
    async with connect_reconnecting(broker.url) as emitter:
        yield emitter


@pytest.fixture
def key(broker: Broker) -> str:
    return broker.keygen("#/", "rwlsp")


async def store(broker: Broker, *numbers: int, ttl: int = TTL) -> None:
    for number in numbers:
        await broker.publish("a/", str(number), ttl=ttl)


async def take(log: Consumer, count: int) -> list[int]:
    return [(await anext(log)).as_object() for _ in range(count)]


# Lost connections


@pytest.mark.parametrize("while_down", ["wait", "raise"])
async def test_what_is_stored_while_disconnected_is_read(
    broker: Broker, key: str, while_down: str
) -> None:
    async with connect_reconnecting(broker.url, while_down=while_down) as emitter:
        async with emitter.consume(key, "a/") as log, anyio.create_task_group() as tasks:
            received: list[int] = []

            async def consume() -> None:
                received.extend(await take(log, 7))

            tasks.start_soon(consume)
            await store(broker, 1, 2)
            await anyio.wait_all_tasks_blocked()
            async with while_disconnected(emitter, broker):
                await store(broker, 3, 4)
            await force_reconnect(emitter, broker)
            await store(broker, 5)
            await anyio.wait_all_tasks_blocked()
            await store(broker, 6, 7)
        assert received == [1, 2, 3, 4, 5, 6, 7]
        assert log.complete


async def test_connections_lost_at_any_moment_cost_nothing(broker: Broker, key: str) -> None:
    rng = random.Random(5)
    numbers = list(range(400))
    async with (
        connect_reconnecting(broker.url) as emitter,
        emitter.consume(key, "a/") as log,
        anyio.create_task_group() as tasks,
    ):
        received: list[int] = []

        async def consume() -> None:
            received.extend(await take(log, len(numbers)))
            tasks.cancel_scope.cancel()

        async def lose() -> None:
            while True:
                await emitter.wait_connected()
                for _ in range(rng.randrange(100)):
                    await anyio.lowlevel.checkpoint()
                await broker.drop()

        tasks.start_soon(consume)
        tasks.start_soon(lose)
        for number in numbers:
            await store(broker, number)
            await anyio.lowlevel.checkpoint()
    assert received == numbers


async def test_reconnecting_on_request_costs_nothing(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    numbers = list(range(60))
    async with emitter.consume(key, "a/") as log, anyio.create_task_group() as tasks:
        received: list[int] = []

        async def consume() -> None:
            received.extend(await take(log, len(numbers)))

        tasks.start_soon(consume)
        for number in numbers:
            await store(broker, number)
            if number % 10 == 0:
                await emitter.reconnect()
    assert received == numbers
    assert log.complete


async def test_giving_up_ends_an_iteration_with_the_error(broker: Broker, key: str) -> None:
    with pytest.raises(ConnectionLostError):
        async with connect_once(broker.url) as emitter, emitter.consume(key, "a/") as log:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(broker.drop)
                with anyio.CancelScope(shield=True), pytest.raises(ConnectionLostError):
                    await anext(log)
            await anyio.sleep_forever()


async def test_giving_up_while_reading_ends_an_iteration(broker: Broker, key: str) -> None:
    await store(broker, 1)
    with pytest.raises(ConnectionLostError):
        async with connect_once(broker.url) as emitter, emitter.consume(key, "a/") as log:
            with broker.hold("reply", "puback"):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(broker.drop)
                    with anyio.CancelScope(shield=True), pytest.raises(ConnectionLostError):
                        await anext(log)
            await anyio.sleep_forever()


async def test_a_refused_subscription_ends_the_consumer(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.consume(key, "a/") as log:
        await store(broker, 1)
        assert await take(log, 1) == [1]
        await emitter.keyban(broker.secret_key, key)
        await force_reconnect(emitter, broker)
        for _ in range(2):
            with pytest.raises(UnauthorizedError):
                await anext(log)


async def test_iteration_continues_after_a_timeout(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    await store(broker, 1)
    async with emitter.consume(key, "a/", timeout=0.1) as log:
        with broker.lose("reply", "puback"), pytest.raises(RequestTimeoutError):
            await anext(log)
        received: list[int] = []
        while not received:
            # A busy machine might be slow again.
            with suppress(RequestTimeoutError):
                received = await take(log, 1)
        assert received == [1]


async def test_entering_that_fails_leaves_no_subscription(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    for after in None, "now":
        with broker.lose("reply", "puback"), pytest.raises(RequestTimeoutError):
            async with emitter.consume(key, "a/", after=after, timeout=0.01):
                pytest.fail("it was entered")  # pragma: no cover
        await emitter.flush()
        assert subscribed_channels(broker) == []


async def test_a_key_function_is_called_again_when_its_key_expires(
    broker: Broker, emitter: Emitter
) -> None:
    calls = 0

    async def key() -> str:
        nonlocal calls
        calls += 1
        return broker.keygen("a/", "rl", ttl=60)

    async with emitter.consume(key, "a/") as log:
        await store(broker, 1)
        assert await take(log, 1) == [1]
        broker.advance(100)
        await store(broker, 2)
        assert await take(log, 1) == [2]
    assert calls == 2


# Expiry


async def test_an_expired_message_at_the_cursor_makes_it_incomplete(
    broker: Broker, emitter: Emitter, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    await store(broker, 1, ttl=60)
    async with emitter.consume(key, "a/") as log:
        assert await take(log, 1) == [1]
        cursor = log.cursor
    await store(broker, 2)
    async with emitter.consume(key, "a/", after=cursor) as log:
        assert await take(log, 1) == [2]
        assert log.complete
    broker.advance(61)
    async with emitter.consume(key, "a/", after=cursor) as log:
        assert log.complete
        assert await take(log, 1) == [2]
        assert not log.complete
    (record,) = caplog.records
    assert "the last message that was read before has expired" in record.getMessage()
    # A message that expires while the consumer is connected had been read.
    await store(broker, 3, ttl=60)
    async with emitter.consume(key, "a/", after="now") as log:
        await store(broker, 4, ttl=60)
        assert await take(log, 1) == [4]
        broker.advance(61)
        await store(broker, 5, ttl=60)
        assert await take(log, 1) == [5]
        assert log.complete
        async with while_disconnected(emitter, broker):
            broker.advance(61)
            await store(broker, 6)
        assert await take(log, 1) == [6]
        assert not log.complete


# Large messages


async def test_a_message_that_cannot_be_read_is_logged_once(
    broker: Broker, emitter: Emitter, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with emitter.consume(key, "a/") as log:
        await store(broker, 1)
        assert await take(log, 1) == [1]
        await broker.publish("a/", b"x" * 60_000, ttl=TTL)
        for number in range(2, 5):
            # The last seconds are read again each time.
            await store(broker, number)
            assert await take(log, 1) == [number]
        assert not log.complete
    (record,) = caplog.records
    assert "consume('a/') might have missed messages stored from" in record.getMessage()


# Large backlogs


async def test_a_large_backlog_is_read_in_windows(
    broker: Broker, emitter: Emitter, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "_MAX_WINDOW_BYTES", 10_000)
    monkeypatch.setattr(forward, "_MAX_HELD_BYTES", 20_000)
    numbers = range(600)
    for number in numbers:
        await store(broker, number)
        if number % 40 == 0:
            broker.advance(number)
    async with emitter.consume(key, "a/") as log:
        assert await take(log, 200) == list(numbers[:200])
        cursor = log.cursor
        found = [m.as_object() async for m in emitter.history(key, "a/", after=cursor)]
        assert found == list(numbers[200:])
        found = [m.as_object() async for m in emitter.history(key, "a/", 7, after=cursor)]
        assert found == list(numbers[200:207])
        found = [m.as_object() async for m in emitter.history(key, "a/", 500)]
        assert found == list(numbers[100:])


async def test_the_end_is_found_although_the_newest_message_cannot_be_read(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    await store(broker, 1)
    broker.advance(60)
    await broker.publish("a/", b"x" * 60_000, ttl=TTL)
    async with emitter.consume(key, "a/", after="now") as log:
        await store(broker, 2)
        assert await take(log, 1) == [2]


# Killed processes


CONSUMER = """
import sys

import anyio

from emitter_anyio import connect

url, key, cursor = sys.argv[1:]


async def main() -> None:
    async with connect(url) as emitter, emitter.consume(key, "a/", after=cursor or None) as log:
        async for stored in log:
            print(stored.as_string(), log.cursor, log.complete, flush=True)


anyio.run(main)
"""


@pytest.mark.parametrize("nodes", [1, 2])
async def test_a_consumer_that_is_killed_misses_nothing(
    broker: Broker, tmp_path: Path, nodes: int
) -> None:
    """The lines that a process has printed are what it has saved."""
    program = tmp_path / "consumer.py"
    program.write_text(CONSUMER)
    rng = random.Random(7)
    received: list[int] = []
    cursor = ""
    async with Broker(cluster=broker, patience=0) as other:
        if nodes == 1:
            await other.stop()
        key = broker.keygen("a/", "rlp")
        for number in range(1500):
            await (broker, other)[number % nodes].publish("a/", str(number), ttl=TTL)
            if number % 100 == 0:
                broker.advance(2)
        for kill in range(4):
            command = [sys.executable, str(program), broker.url, key, cursor]
            process = await anyio.open_process(command, stderr=subprocess.DEVNULL)
            assert process.stdout is not None
            wanted = 1500 - len(set(received)) if kill == 3 else rng.randrange(1, 400)
            lines = b""
            while lines.count(b"\n") < wanted:
                lines += await process.stdout.receive()
            process.send_signal(signal.SIGKILL)
            async with process:
                async for chunk in process.stdout:
                    lines += chunk
            for line in lines.splitlines(keepends=True):
                if line.endswith(b"\n"):
                    text, cursor, complete = line.decode().split()
                    received.append(int(text))
                    assert complete == "True"
    assert sorted(set(received)) == list(range(1500))
    if nodes == 1:
        assert received == list(range(1500))


# Clusters


@pytest.fixture
async def nodes(anyio_backend: object) -> AsyncIterator[tuple[Broker, Broker]]:
    async with Broker(patience=0.01) as one, Broker(cluster=one, patience=0.01) as other:
        yield one, other


async def test_it_has_what_each_node_stores(nodes: tuple[Broker, Broker]) -> None:
    one, other = nodes
    key = one.keygen("a/", "rlp")
    async with connect(one.url) as emitter, emitter.consume(key, "a/") as log:
        for number in range(40):
            await store(nodes[number % 2], number)
            if number % 10 == 0:
                one.advance(1)
        assert sorted(await take(log, 40)) == list(range(40))
        cursor = log.cursor
    await store(one, 40)
    await store(other, 41)
    async with connect(other.url) as emitter, emitter.consume(key, "a/", after=cursor) as log:
        assert sorted(await take(log, 2)) == [40, 41]
        assert log.complete


async def test_a_node_that_does_not_answer_makes_it_incomplete(
    nodes: tuple[Broker, Broker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("emitter_anyio._features.history._SLOW_PAGE_SECONDS", 0.001)
    one, other = nodes
    key = one.keygen("a/", "rlp")
    async with connect(one.url) as emitter, emitter.consume(key, "a/") as log:
        other.pause()
        await store(one, 1)
        assert await take(log, 1) == [1]
        await store(one, 2)
        assert await take(log, 1) == [2]
        assert not log.complete
        other.resume()
    assert "might not have replied" in caplog.text


@asynccontextmanager
async def consuming_from_nodes_with_other_clocks(
    ahead: float, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Broker, Broker, list[int]]]:
    """Consume until the block ends, from two nodes of which the second one is ahead."""
    async with Broker() as one, Broker(cluster=one) as two:
        cluster = one._exchange.cluster
        monkeypatch.setattr(two._exchange, "now", lambda: cluster.now() + ahead)
        found: list[int] = []
        async with (
            connect(connectable=one.connectable()) as emitter,
            emitter.consume(one.keygen("a/", "rwsl"), "a/") as log,
            anyio.create_task_group() as tasks,
        ):

            async def consume() -> None:
                async for message in log:
                    found.append(message.as_object())  # noqa: PERF401 - the test reads it

            tasks.start_soon(consume)
            yield one, two, found
            tasks.cancel_scope.cancel()


@pytest.mark.virtual_time
@pytest.mark.parametrize("ahead", [30, 600])
async def test_messages_of_a_node_whose_clock_is_behind_are_returned_late(
    anyio_backend: object,
    ahead: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    nodes = consuming_from_nodes_with_other_clocks(ahead, monkeypatch)
    async with nodes as (one, two, found):
        for number in range(100):
            await store((one, two)[number % 2], number)
            await anyio.sleep(1)
        await anyio.sleep(121)
    assert sorted(found) == list(range(100))
    assert "the clocks of the nodes differ" in caplog.text


@pytest.mark.virtual_time
async def test_messages_before_the_clock_of_a_node_passes_the_position_are_returned(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = consuming_from_nodes_with_other_clocks(30, monkeypatch)
    async with nodes as (one, two, found):
        await store(one, 0)
        await store(two, 1)
        for number in range(2, 12):
            await anyio.sleep(5)
            await store(one, number)
        await anyio.sleep(1)
        assert found == list(range(12))


# Matchers


async def test_with_the_mqtt_matcher_messages_below_wake_it() -> None:
    async with Broker(matcher="mqtt") as broker:
        key = broker.keygen("a/#/", "rwsl")
        async with connect(broker.url, matcher="mqtt") as emitter:
            async with emitter.consume(key, "a/") as log, emitter.consume(key, "a/#/") as below:
                for number, channel in enumerate(("a/", "a/b/", "a/b/c/")):
                    await emitter.publish(key, channel, number, ttl=60)
                    assert await take(log, 1) == [number]
                assert await take(below, 2) == [1, 2]


# Waiting


@pytest.mark.virtual_time
async def test_storage_is_read_every_minute_although_nothing_arrives(
    anyio_backend: object,
) -> None:
    async with Broker() as broker:
        key = broker.keygen("a/", "rwsl")
        async with connect(connectable=broker.connectable(), reconnect=Backoff(1, 1)) as emitter:
            async with emitter.consume(key, "a/") as log:
                with anyio.move_on_after(1):
                    await anext(log)
                # The broker does not deliver it to this connection.
                await emitter.publish(key, "a/", 1, ttl=3600, echo=False)
                start = anyio.current_time()
                assert await take(log, 1) == [1]
                assert 50 < anyio.current_time() - start <= 61


@pytest.mark.virtual_time
async def test_messages_that_are_not_stored_cause_few_requests(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Broker() as broker:
        requests: list[object] = []
        query = broker._exchange.query

        async def note(*arguments: Any) -> list[Stored]:
            requests.append(arguments)
            return await query(*arguments)

        monkeypatch.setattr(broker._exchange, "query", note)
        key = broker.keygen("a/", "rwsl")
        async with connect(connectable=broker.connectable(), reconnect=Backoff(1, 1)) as emitter:
            async with emitter.consume(key, "a/") as log, anyio.create_task_group() as tasks:
                tasks.start_soon(take, log, 1)
                await anyio.sleep(1)
                requests.clear()
                for _ in range(1000):
                    await broker.publish("a/", "passing")
                    await anyio.sleep(0.01)
                # Reading an empty channel takes some 35 requests.
                assert 35 < len(requests) < 20 * 35
                await store(broker, 1)
