"""An outbox and its client, with the development broker."""

from __future__ import annotations

import asyncio
import logging
import pickle
import sqlite3
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
import sniffio
from anyio import to_thread

from emitter_anyio import (
    Backoff,
    ChannelKey,
    ClosedError,
    ConnectionLostError,
    Emitter,
    EmitterMessage,
    EventStream,
    InvalidChannelError,
    MessageTooLargeError,
    ServerError,
    UnauthorizedError,
    WrongLoopError,
    connect,
)
from emitter_anyio._runtime.holds import Holds
from emitter_anyio.outbox import (
    MessageParkedError,
    MessagesGivenUpError,
    Outbox,
    OutboxError,
    OutboxFullError,
    OutboxInUseError,
    OutboxStatistics,
)
from emitter_anyio.outbox import _sender as sender_module
from emitter_anyio.outbox import _store as store_module
from emitter_anyio.outbox._journal import _Entry
from emitter_anyio.outbox._schedule import Schedule
from emitter_anyio.outbox._values import Record
from emitter_anyio.testing import Broker
from tests.client.tools import Calls
from tests.outbox.test_store import limit_pages, read_only
from tests.support import packets
from tests.support.connections import connect_once, connect_reconnecting, while_disconnected
from tests.support.logs import logged
from tests.support.peer import PUBLISH, Peer, memory_peer
from tests.support.steps import all_cancel_styles, cancel_at_step

pytestmark = pytest.mark.anyio

NO_KEY = "A" * 32
EMPTY = OutboxStatistics(0, None, 0, 0, 0)


@pytest.fixture
def emitter(broker: Broker) -> Emitter:
    """A client that is not entered yet, and reconnects immediately."""
    return connect_reconnecting(broker.url)


@asynccontextmanager
async def listening(
    broker: Broker, key: str, channel: str = "a/"
) -> AsyncGenerator[EventStream[EmitterMessage]]:
    """Subscribe with another client."""
    async with connect_once(broker.url) as other, other.subscribe(key, channel) as messages:
        yield messages


async def take(messages: EventStream[EmitterMessage], count: int) -> list[Any]:
    return [(await messages.receive()).as_object() for _ in range(count)]


async def sent(box: Outbox) -> None:
    """Wait until no message waits."""
    while box.statistics().waiting:  # noqa: ASYNC110 - the figures have no event
        await anyio.sleep(0.001)


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - not every state has an event
        await anyio.sleep(0.001)


def store_of(box: Outbox) -> Any:
    return box._store


class TestBeforeTheConnection:
    async def test_messages_wait_until_client_is_entered(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        async with listening(broker, key) as messages, Outbox(path, emitter, key) as box:
            for number in range(5):
                await box.publish("a/", number)
            assert box.statistics().waiting == 5
            assert box.statistics().oldest is not None
            async with emitter:
                assert await take(messages, 5) == list(range(5))
                await sent(box)
            assert box.statistics() == EMPTY

    async def test_messages_survive_restart_of_program(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        async with Outbox(path, emitter, key) as box:
            await box.publish("a/", 1)
        async with Outbox(path, emitter, key) as box:
            await box.publish("a/", 2)
            assert box.statistics().waiting == 2
        async with listening(broker, key) as messages, emitter, Outbox(path, emitter, key):
            assert await take(messages, 2) == [1, 2]

    async def test_client_running_in_task_group_sends_messages(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        async with listening(broker, key) as messages, Outbox(path, emitter, key) as box:
            await box.publish("a/", 1)
            async with anyio.create_task_group() as tasks:
                await tasks.start(emitter.run)
                assert await take(messages, 1) == [1]
                tasks.cancel_scope.cancel()

    async def test_messages_are_sent_when_first_connection_succeeds(
        self, broker: Broker, key: str, path: Path
    ) -> None:
        emitter = connect_reconnecting(broker.url, retry_first_connect=True)
        async with listening(broker, key) as messages, Outbox(path, emitter, key) as box:
            async with anyio.create_task_group() as tasks:
                with broker.refuse():
                    tasks.start_soon(emitter.run)
                    await box.publish("a/", 1)
                    await until(lambda: emitter.state == "connecting")
                assert await take(messages, 1) == [1]
                tasks.cancel_scope.cancel()

    async def test_messages_are_sent_when_client_is_entered_again(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        async with listening(broker, key) as messages, Outbox(path, emitter, key) as box:
            for number in range(3):
                await box.publish("a/", number)
                async with emitter:
                    assert await take(messages, 1) == [number]
                await box.publish("a/", -1)
                async with emitter:
                    assert await take(messages, 1) == [-1]


class TestLeaving:
    async def test_leaving_outbox_first_sends_waiting_messages(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        async with listening(broker, key) as messages:
            async with emitter, Outbox(path, emitter, key) as box:
                for number in range(20):
                    await box.publish("a/", number)
            assert await take(messages, 20) == list(range(20))

    async def test_leaving_client_first_sends_waiting_messages(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        async with listening(broker, key) as messages:
            async with Outbox(path, emitter, key) as box:
                for number in range(20):
                    await box.publish("a/", number)
                async with emitter:
                    pass
                assert box.statistics().waiting == 0
            assert await take(messages, 20) == list(range(20))

    @pytest.mark.parametrize("first", ["outbox", "client"])
    async def test_messages_not_accepted_in_time_stay_in_file(
        self, broker: Broker, key: str, path: Path, first: str
    ) -> None:
        emitter = connect_reconnecting(broker.url, disconnect_timeout=0.1)
        with broker.lose("puback"):
            async with AsyncExitStack() as stack:
                if first == "outbox":
                    await stack.enter_async_context(emitter)
                box = await stack.enter_async_context(Outbox(path, emitter, key))
                if first == "client":
                    await stack.enter_async_context(emitter)
                await box.publish("a/", 1)
        async with Outbox(path, emitter, key) as box:
            assert box.statistics().waiting == 1

    async def test_leaving_without_connection_does_not_wait(
        self, broker: Broker, key: str, path: Path
    ) -> None:
        emitter = connect_reconnecting(broker.url, disconnect_timeout=3600)
        async with Outbox(path, emitter, key) as box:
            await box.publish("a/", 1)
        async with Outbox(path, emitter, key) as box, emitter:
            with broker.lose("puback"):
                await box.publish("a/", 2)
                async with emitter.stream("disconnect") as lost:
                    with broker.refuse():
                        await broker.drop()
                        await lost.receive()
                        await emitter.disconnect()

    async def test_connection_lost_while_client_is_left_keeps_message(
        self, broker: Broker, key: str, path: Path
    ) -> None:
        emitter = connect_reconnecting(broker.url, disconnect_timeout=3600)
        async with Outbox(path, emitter, key) as box, anyio.create_task_group() as tasks:
            async with emitter:
                with broker.hold("puback"):
                    await box.publish("a/", 1)
                    tasks.start_soon(emitter.disconnect)
                    await until(lambda: emitter.state == "closing")
                    await broker.drop()
                    await emitter.wait_closed()
            assert box.statistics().waiting == 1

    async def test_exception_of_the_block_is_raised_unchanged(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        error = ValueError("the program's own")
        with pytest.raises(ValueError, match="own") as caught:
            async with emitter, Outbox(path, emitter, key) as box:
                await box.publish("a/", 1)
                raise error
        assert caught.value is error

    async def test_final_connection_loss_is_raised_bare(
        self, broker: Broker, key: str, path: Path
    ) -> None:
        emitter = connect_once(broker.url)
        with pytest.raises(ConnectionLostError):
            async with emitter, Outbox(path, emitter, key) as box:
                await box.publish("a/", 1)
                await sent(box)
                await broker.drop()
                await anyio.sleep_forever()

    async def test_outbox_can_be_entered_again(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        box = Outbox(path, emitter, key)
        async with listening(broker, key) as messages:
            for number in range(3):
                async with box:
                    await box.publish("a/", number)
                with pytest.raises(ClosedError, match="not entered"):
                    await box.publish("a/", "late")
                with pytest.raises(ClosedError):
                    box.statistics()
            async with emitter, box:
                assert await take(messages, 3) == [0, 1, 2]

    async def test_entering_twice_and_leaving_too_often_are_rejected(
        self, emitter: Emitter, key: str, path: Path
    ) -> None:
        box = Outbox(path, emitter, key)
        with pytest.raises(RuntimeError, match="not entered"):
            await box.__aexit__(None, None, None)
        async with box:
            with pytest.raises(RuntimeError, match="already entered"):
                await box.__aenter__()
        with pytest.raises(RuntimeError, match="not entered"):
            await box.__aexit__(None, None, None)
        with pytest.raises(TypeError, match="async with"):
            with box:  # type: ignore[attr-defined]
                pass  # pragma: no cover
        box.__exit__(None, None, None)  # type: ignore[attr-defined]

    async def test_calls_while_outbox_is_being_left_are_rejected(
        self, broker: Broker, key: str, path: Path
    ) -> None:
        emitter = connect_reconnecting(broker.url, disconnect_timeout=3600)
        box = Outbox(path, emitter, key)
        with broker.hold("puback"):
            async with emitter, anyio.create_task_group() as tasks:
                await box.__aenter__()
                await box.publish("a/", 1)
                tasks.start_soon(publish_when_closed, box, broker)
                await box.__aexit__(None, None, None)


async def publish_when_closed(box: Outbox, broker: Broker) -> None:
    await until(lambda: not box._open)
    with pytest.raises(ClosedError):
        await box.publish("a/", 2)
    await broker.drop()


class TestDelivery:
    async def test_messages_of_each_channel_arrive_in_order(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        received: dict[str, list[int]] = {}
        async with Outbox(path, emitter, key) as box:
            async with anyio.create_task_group() as tasks:
                for number in range(600):
                    tasks.start_soon(box.publish, f"a/{number % 3}/", number)
                    await anyio.lowlevel.checkpoint()
            async with listening(broker, key) as messages, emitter:
                for _ in range(600):
                    message = await messages.receive()
                    received.setdefault(message.channel, []).append(message.as_object())
        assert received == {f"a/{n}/": list(range(n, 600, 3)) for n in range(3)}

    async def test_messages_are_sent_again_from_oldest_after_lost_connection(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        async with (
            listening(broker, key) as messages,
            emitter,
            Outbox(path, emitter, key) as box,
            anyio.create_task_group() as tasks,
        ):
            await box.publish("a/", -1)
            await sent(box)
            assert await take(messages, 1) == [-1]
            with broker.hold("puback"):
                for number in range(10):
                    tasks.start_soon(box.publish, "a/", number)
                    await anyio.lowlevel.checkpoint()
                assert await take(messages, 10) == list(range(10))
                (other, own) = broker.clients
                assert other.id != own.id
                await broker.drop(own)
            assert await take(messages, 10) == list(range(10))
            await sent(box)

    async def test_messages_are_sent_after_broker_restarts(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        async with emitter, Outbox(path, emitter, key) as box:
            async with anyio.create_task_group() as tasks:
                for number in range(300):
                    tasks.start_soon(box.publish, "a/", number, 60)
                    await anyio.lowlevel.checkpoint()
                    if number in (50, 150, 200):
                        await broker.stop()
                        await broker.restart()
            await sent(box)
            stored = [message.as_object() async for message in emitter.history(key, "a/", 9999)]
        assert set(stored) == set(range(300))

    async def test_while_down_raise_does_not_affect_outbox(
        self, broker: Broker, key: str, path: Path
    ) -> None:
        emitter = connect_reconnecting(broker.url, while_down="raise")
        async with (
            listening(broker, key) as messages,
            emitter,
            Outbox(path, emitter, key) as box,
        ):
            await box.publish("a/", 1)
            await sent(box)
            (_, own) = broker.clients
            with broker.refuse():
                await broker.drop(own)
                await box.publish("a/", 2)
            assert await take(messages, 2) == [1, 2]

    async def test_messages_without_acknowledgement_are_sent_again(
        self, broker: Broker, key: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Disconnecting waits for the lost acknowledgements.
        emitter = connect_reconnecting(broker.url, request_timeout=0.1, disconnect_timeout=0.1)
        async with (
            listening(broker, key) as messages,
            emitter,
            Outbox(path, emitter, key) as box,
        ):
            with broker.lose("puback"):
                async with anyio.create_task_group() as tasks:
                    for number in range(3):
                        tasks.start_soon(box.publish, "a/", number)
                        await anyio.lowlevel.checkpoint()
                received: list[int] = []
                while any(received.count(number) < 2 for number in range(3)):
                    received += await take(messages, 1)
            await sent(box)
        # On a busy machine, the first is sent again before the last is sent.
        assert sorted(set(received), key=received.index) == [0, 1, 2]

    async def test_acknowledgement_after_a_missing_one_counts(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        received = []

        async def script(peer: Peer) -> None:
            await peer.accept()
            while packet := await peer.packet():
                if packet.kind != PUBLISH:
                    continue
                received.append(packet.payload)
                if packet.payload != b"0" or received.count(b"0") > 1:
                    await peer.send(packets.puback(packet.packet_id))

        async with memory_peer(script) as connectable:
            emitter = connect_reconnecting(connectable=connectable, request_timeout=0.1)
            async with Outbox(path, emitter, NO_KEY) as box:
                for number in range(3):
                    await box.publish("a/", number)
                async with emitter:
                    await sent(box)
        assert received == [b"0", b"1", b"2", b"0"]

    async def test_messages_beyond_window_and_queue_are_sent_in_order(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        async with Outbox(path, emitter, key) as box:
            async with anyio.create_task_group() as tasks:
                for number in range(1200):
                    tasks.start_soon(box.publish, "a/", number)
                    await anyio.lowlevel.checkpoint()
                for _ in range(40):
                    tasks.start_soon(box.publish, "b/", b"x" * 60_000)
            async with listening(broker, key) as messages, emitter:
                assert await take(messages, 1200) == list(range(1200))
                await sent(box)

    async def test_connection_lost_while_message_waits_for_queue_space(self, path: Path) -> None:
        received: list[bytes] = []
        may_close = anyio.Event()
        connections = 0

        async def script(peer: Peer) -> None:
            nonlocal connections
            connections += 1
            await peer.accept()
            if connections == 1:
                await may_close.wait()
                return
            while packet := await peer.packet():
                if packet.kind == PUBLISH:
                    received.append(packet.payload[:2])
                    await peer.send(packets.puback(packet.packet_id))

        async with memory_peer(script, capacity=1024) as connectable:
            emitter = connect_reconnecting(connectable=connectable)
            async with Outbox(path, emitter, NO_KEY) as box:
                for number in range(10, 30):
                    await box.publish("a/", b"%d" % number + b"x" * 60_000)
                async with emitter:
                    await until(lambda: box._sender._sending)
                    may_close.set()
                    await sent(box)
        assert received == [b"%d" % number for number in range(10, 30)]

    async def test_outbox_is_idle_while_a_channel_is_due_without_a_connection(
        self, broker: Broker, emitter: Emitter, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sender_module, "_BACKOFF", Backoff(0.001, 0.001))
        turns = 0
        take_next = sender_module.Sender._next

        def count_turn(self: Any) -> Any:
            nonlocal turns
            turns += 1
            return take_next(self)

        monkeypatch.setattr(sender_module.Sender, "_next", count_turn)

        async def get_key(channel: str) -> str:
            return await keys.receive()

        keys_in, keys = anyio.create_memory_object_stream[str](1)
        async with Outbox(path, emitter, get_key) as box, emitter, keys_in, keys:
            await box.publish("a/", 1)
            await until(lambda: keys.statistics().tasks_waiting_receive)
            async with emitter.stream("disconnect") as lost:
                with broker.refuse():
                    await broker.drop()
                    await lost.receive()
                    await keys_in.send("no key")  # now the channel is due
                    await until(lambda: box._sender._schedule._due["a/"] < 1e12)
                    turns = 0
                    for _ in range(100):
                        await anyio.lowlevel.checkpoint()
                    assert turns < 10

    async def test_messages_that_are_stored_after_a_failed_read_are_sent(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        async with listening(broker, key) as messages, emitter, Outbox(path, emitter, key) as box:
            await box.publish("a/", 1)
            assert await take(messages, 1) == [1]
            await sent(box)
            box._journal._read_at = anyio.current_time() + 3600  # as after an error
            await box.publish("a/", 2)
            box._journal._read_at = 0
            box._journal.wake()
            assert await take(messages, 1) == [2]

    async def test_calls_that_wait_when_the_outbox_is_left_return(
        self, emitter: Emitter, key: str, path: Path
    ) -> None:
        ended = []

        async def call(box: Outbox) -> None:
            with suppress(ClosedError):
                await box.parked()
            ended.append(box)

        async with anyio.create_task_group() as tasks:
            async with Outbox(path, emitter, key) as box:
                for _ in range(3):
                    tasks.start_soon(call, box)
                await anyio.lowlevel.checkpoint()
        assert ended == [box] * 3

    async def test_publish_that_was_cancelled_when_the_outbox_is_left_is_not_stored(
        self, emitter: Emitter, key: str, path: Path
    ) -> None:
        async with Outbox(path, emitter, key) as box:
            await box.publish("a/", 1)
            for cancelled in (True, False):
                entry = _Entry(Record("a/", b"", None, False, True))
                entry.cancelled = cancelled
                box._journal._incoming.append(entry)
        async with Outbox(path, emitter, key) as box:
            assert box.statistics().waiting == 2

    async def test_client_does_not_wait_for_an_outbox_that_was_left(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("emitter_anyio.outbox._journal._DELAY_SECONDS", 3600)

        async def script(peer: Peer) -> None:
            await peer.accept()
            while packet := await peer.packet():
                if packet.payload == b"1":
                    await peer.send(packets.puback(packet.packet_id))

        async with memory_peer(script) as connectable:
            emitter = connect_reconnecting(connectable=connectable, disconnect_timeout=3600)
            async with Outbox(path, emitter, NO_KEY) as box:
                for number in (1, 2):
                    await box.publish("a/", number)
            async with emitter:
                with anyio.CancelScope() as scope:
                    async with Outbox(path, emitter, NO_KEY) as box:
                        await until(lambda: box.statistics().waiting == 1)
                        scope.cancel()
                        await anyio.sleep_forever()
                await anyio.lowlevel.checkpoint()

    async def test_publishes_that_wait_when_the_outbox_is_left_are_stored(
        self, emitter: Emitter, key: str, path: Path
    ) -> None:
        box = Outbox(path, emitter, key)
        stored = []

        async def publish(number: int) -> None:
            with suppress(ClosedError):  # on Trio, the task might run when the block was left
                await box.publish("a/", number)
                stored.append(number)

        async with anyio.create_task_group() as tasks:
            async with box:
                await box.publish("a/", -1)
                for number in range(3):
                    tasks.start_soon(publish, number)
                await anyio.lowlevel.checkpoint()
        async with box:
            assert box.statistics().waiting == 1 + len(stored)

    async def test_trace_reports_publishes(self, broker: Broker, key: str, path: Path) -> None:
        names = []
        emitter = connect_reconnecting(broker.url, trace=lambda name, _: names.append(name))
        async with emitter, Outbox(path, emitter, key) as box:
            await box.publish("a/", 1)
        assert [name for name in names if name.startswith("publish")] == [
            "publish.started",
            "publish.complete",
        ]


class TestTtl:
    async def test_broker_stores_for_the_remaining_time(
        self,
        broker: Broker,
        emitter: Emitter,
        key: str,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        steady = store_module._steady
        async with Outbox(path, emitter, key) as box:
            await box.publish("a/", 1, ttl=1000)
            await box.publish("a/", 2, ttl=500)
            monkeypatch.setattr(store_module, "_steady", lambda: steady() + 600)
            async with emitter:
                await sent(box)
                assert box.statistics().given_up == 1
                broker.advance(300)
                stored = [m.as_object() async for m in emitter.history(key, "a/")]
                assert stored == [1]
                broker.advance(200)
                assert [m async for m in emitter.history(key, "a/")] == []

    async def test_old_messages_are_given_up_and_reported(
        self, emitter: Emitter, key: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steady = store_module._steady
        errors = Calls()
        emitter.on("error", errors)
        async with Outbox(path, emitter, key, max_age=3600) as box:
            await box.publish("a/", 1)
            await box.publish("a/", 2)
            monkeypatch.setattr(store_module, "_steady", lambda: steady() + 3600)
            async with emitter:
                (error,) = await errors.get(1)
                assert isinstance(error, MessagesGivenUpError)
                assert error.count == 2
                assert "gave up 2 messages" in str(error)
                assert "too old" in str(error)
                assert box.statistics() == OutboxStatistics(0, None, 0, 2, 0)
        async with Outbox(path, emitter, key, max_age=None) as box:
            assert box.statistics().given_up == 2

    async def test_message_that_becomes_too_old_in_memory_is_given_up(
        self, broker: Broker, emitter: Emitter, key: str, path: Path, monkeypatch: Any
    ) -> None:
        async with Outbox(path, emitter, key, max_age=3600) as box:
            await box.publish("a/", 1)
            monkeypatch.setattr(box._sender, "_max_age", 0)
            async with emitter:
                await sent(box)
            assert box.statistics().given_up == 1

    async def test_old_messages_are_given_up_without_a_connection(
        self, emitter: Emitter, key: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("emitter_anyio.outbox._journal._SWEEP_SECONDS", 0.01)
        async with Outbox(path, emitter, key, max_age=0.1) as box:
            await box.publish("a/", 1)
            await sent(box)
            assert box.statistics().given_up == 1


class TestRefusals:
    async def test_refused_message_is_parked_and_reported_and_does_not_delay_others(
        self, broker: Broker, emitter: Emitter, path: Path
    ) -> None:
        key = broker.keygen("a/", "rw")
        errors = Calls()
        emitter.on("error", errors)
        async with (
            listening(broker, key) as messages,
            emitter,
            Outbox(path, emitter, key) as box,
        ):
            await box.publish("b/", "refused")
            await box.publish("a/", 1)
            assert await take(messages, 1) == [1]
            (error,) = await errors.get(1)
            assert isinstance(error, MessageParkedError)
            assert isinstance(error.__cause__, UnauthorizedError)
            (parked,) = await box.parked()
            assert error.message.id == parked.id
            assert (parked.channel, parked.as_string(), parked.status) == ("b/", "refused", 401)
            assert parked.reason == str(error.__cause__)
            assert parked.age >= 0
            assert "refused" not in repr(parked)
            assert pickle.loads(pickle.dumps(error)).message == error.message
            assert box.statistics() == OutboxStatistics(0, None, 1, 0, 2 + 7 + 128)

    async def test_parked_messages_are_retried_and_dropped(
        self, broker: Broker, emitter: Emitter, path: Path, key: str
    ) -> None:
        wrong = broker.keygen("x/", "rw")
        async with emitter, Outbox(path, emitter, wrong) as box:
            for number in range(5):
                await box.publish("a/", number)
            await sent(box)
            assert await box.retry() == 5
            await sent(box)
            assert box.statistics().parked == 5
        async with (
            listening(broker, key) as messages,
            emitter,
            Outbox(path, emitter, key) as box,
        ):
            parked = await box.parked()
            assert [message.as_object() for message in parked] == list(range(5))
            assert await box.drop(parked[:2]) == 2
            assert await box.drop(parked[:3]) == 1
            assert await box.retry(parked) == 2
            assert await box.retry([]) == 0
            assert await take(messages, 2) == [3, 4]
            await sent(box)
            assert box.statistics() == EMPTY
            assert await box.retry() == 0

    async def test_refusal_is_logged_without_a_handler(
        self, emitter: Emitter, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with emitter, Outbox(path, emitter, NO_KEY) as box:
            await box.publish("a/", 1)
            await sent(box)
        (line,) = logged(caplog, logging.WARNING)
        assert "parked a message to 'a/' in the outbox" in line.getMessage()

    async def test_message_that_broker_cannot_process_is_sent_again(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sender_module, "_BACKOFF", Backoff(0.001, 0.001))
        received: list[bytes] = []

        async def script(peer: Peer) -> None:
            await peer.accept()
            while packet := await peer.packet():
                if packet.kind != PUBLISH:
                    continue
                received.append(packet.payload)
                if packet.payload == b"1" and received.count(b"1") < 4:
                    refusal = b'{"req":%d,"status":500,"message":"no"}' % packet.packet_id
                    await peer.send(packets.publish("emitter/error/", refusal))
                await peer.send(packets.puback(packet.packet_id))

        errors = Calls()
        async with memory_peer(script) as connectable:
            emitter = connect_reconnecting(connectable=connectable)
            emitter.on("error", errors)
            async with Outbox(path, emitter, NO_KEY) as box:
                await box.publish("a/", 1)
                await box.publish("b/", 2)
                async with emitter:
                    await sent(box)
                    await box.publish("a/", 3)
                    await sent(box)
                    (error,) = await errors.get(1)
        assert isinstance(error, ServerError)
        assert received == [b"1", b"2", b"1", b"1", b"1", b"3"]

    async def test_messages_in_flight_together_fail_once(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sender_module, "_BACKOFF", Backoff(1800, 3600))
        refused = 0

        async def script(peer: Peer) -> None:
            nonlocal refused
            await peer.accept()
            while packet := await peer.packet():
                if packet.kind == PUBLISH:
                    refused += 1
                    refusal = b'{"req":%d,"status":500,"message":"no"}' % packet.packet_id
                    await peer.send(packets.publish("emitter/error/", refusal))
                    await peer.send(packets.puback(packet.packet_id))

        async with memory_peer(script) as connectable:
            emitter = connect_reconnecting(connectable=connectable, disconnect_timeout=0.01)
            async with Outbox(path, emitter, NO_KEY) as box:
                for number in range(5):
                    await box.publish("a/", number)
                async with emitter:
                    await until(lambda: refused == 5 and not box._sender._flights)
                    assert box._sender._schedule.next_due(0) < anyio.current_time() + 1801

    async def test_message_too_large_with_its_key_is_parked(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        async def key_of(channel: str) -> str:
            return key if channel == "a/" else "k" * 1000

        async with (
            listening(broker, key) as messages,
            emitter,
            Outbox(path, emitter, key_of) as box,
        ):
            await box.publish("b/", b"x" * 65_000)
            await box.publish("a/", 1)
            assert await take(messages, 1) == [1]
            await sent(box)
            (parked,) = await box.parked()
            assert parked.status is None
            assert "too large" in parked.reason


class TestKeys:
    async def test_channel_key_is_accepted(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        async with (
            listening(broker, key) as messages,
            emitter,
            Outbox(path, emitter, ChannelKey(key, "a/")) as box,
        ):
            await box.publish("a/", 1)
            assert await take(messages, 1) == [1]

    async def test_key_function_is_called_once_for_each_channel(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        calls = []

        async def key_of(channel: str) -> ChannelKey:
            calls.append(channel)
            return await emitter.keygen(broker.secret_key, channel, "w")

        async with (
            listening(broker, key) as messages,
            Outbox(path, emitter, key_of) as box,
        ):
            for number in range(10):
                await box.publish(f"a/{number % 2}/", number)
            async with emitter:
                assert sorted(await take(messages, 10)) == list(range(10))
        assert sorted(calls) == ["a/0/", "a/1/"]

    async def test_key_is_not_written_to_the_file(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        async def key_of(channel: str) -> str:
            return key

        for source in (key, key_of):
            async with emitter, Outbox(path, emitter, source) as box:
                await box.publish("a/", "payload")
                await box.publish("b/", "payload")
                await sent(box)
                written = b"".join(file.read_bytes() for file in path.parent.iterdir())
                assert b"payload" in written
                assert key.encode() not in written

    async def test_key_function_of_one_channel_does_not_delay_others(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        may_return = anyio.Event()

        async def key_of(channel: str) -> str:
            if channel == "a/slow/":
                await may_return.wait()
            return key

        async with (
            listening(broker, key) as messages,
            Outbox(path, emitter, key_of) as box,
        ):
            for number in range(20):
                await box.publish("a/slow/" if number < 15 else "a/quick/", number)
            async with emitter:
                assert await take(messages, 5) == list(range(15, 20))
                await box.publish("a/slow/", 20)
                assert box.statistics().waiting >= 16
                may_return.set()
                assert await take(messages, 16) == [*range(15), 20]

    async def test_failure_of_a_key_function_is_reported_once_and_retried(
        self,
        broker: Broker,
        emitter: Emitter,
        key: str,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(sender_module, "_BACKOFF", Backoff(0.001, 0.001))
        failures: list[Exception] = [LookupError("no key"), LookupError("no key")]

        async def key_of(channel: str) -> str:
            if channel == "a/bad/" and failures:
                raise failures.pop()
            return key

        errors = Calls()
        emitter.on("error", errors)
        async with (
            listening(broker, key) as messages,
            Outbox(path, emitter, key_of) as box,
        ):
            await box.publish("a/bad/", 1)
            await box.publish("a/good/", 2)
            async with emitter:
                assert await take(messages, 2) == [2, 1]
        (error,) = errors.values
        assert isinstance(error, OutboxError)
        assert "cannot get a key for the messages to 'a/bad/'" in str(error)
        assert isinstance(error.__cause__, LookupError)

    async def test_refused_key_is_renewed_once(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        keys = [NO_KEY, key]

        async def key_of(channel: str) -> str:
            return keys.pop(0) if len(keys) > 1 else keys[0]

        async with listening(broker, key) as messages, Outbox(path, emitter, key_of) as box:
            for number in range(5):
                await box.publish("a/", number)
            async with emitter:
                assert await take(messages, 5) == list(range(5))
                await sent(box)
                assert box.statistics().parked == 0

    async def test_message_that_a_renewed_key_does_not_permit_is_parked(
        self, broker: Broker, emitter: Emitter, path: Path
    ) -> None:
        async def key_of(channel: str) -> str:
            return NO_KEY

        async with emitter, Outbox(path, emitter, key_of) as box:
            for number in range(3):
                await box.publish("a/", number)
            await sent(box)
            assert [message.as_object() for message in await box.parked()] == [0, 1, 2]

    async def test_key_function_that_is_not_async_is_reported(
        self, broker: Broker, path: Path
    ) -> None:
        # Disconnecting waits for the message, which cannot be sent.
        emitter = connect_reconnecting(broker.url, disconnect_timeout=0.1)
        key_of: Any = lambda channel: NO_KEY  # noqa: E731 - a lambda is what is tested
        errors = Calls()
        emitter.on("error", errors)
        async with Outbox(path, emitter, key_of) as box:
            await box.publish("a/", 1)
            async with emitter:
                (error,) = await errors.get(1)
                assert isinstance(error.__cause__, TypeError)
                assert "async def" in str(error.__cause__)


class TestFiles:
    async def test_second_outbox_is_rejected(self, emitter: Emitter, key: str, path: Path) -> None:
        async with Outbox(path, emitter, key) as box:
            with pytest.raises(OutboxInUseError):
                async with Outbox(path, emitter, key):
                    pytest.fail("it was entered")  # pragma: no cover
            await box.publish("a/", 1)

    async def test_corrupt_file_is_reported_and_set_aside(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        errors = Calls()
        emitter.on("error", errors)
        path.write_bytes(b"anything else" * 100)  # noqa: ASYNC240 - nothing else runs yet
        async with listening(broker, key) as messages, emitter:
            async with Outbox(path, emitter, key) as box:
                (error,) = await errors.get(1)
                assert box.set_aside is not None
                assert box.set_aside.read_bytes() == b"anything else" * 100
                assert isinstance(error, OutboxError)
                assert str(box.set_aside) in str(error)
                await box.publish("a/", 1)
                assert await take(messages, 1) == [1]
            async with Outbox(path, emitter, key) as box:
                assert box.set_aside is None

    async def test_corrupt_file_is_reported_even_if_entering_fails(
        self,
        emitter: Emitter,
        key: str,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async def fail(*_: object) -> None:
            raise RuntimeError("own")

        path.write_bytes(b"anything else" * 100)  # noqa: ASYNC240 - nothing else runs yet
        monkeypatch.setattr("emitter_anyio._backend.tasks.Tasks.open", fail)
        with pytest.raises(RuntimeError, match="own"):
            await Outbox(path, emitter, key).__aenter__()
        (record,) = logged(caplog, logging.WARNING)
        assert "was corrupt" in record.getMessage()

    async def test_full_disk(self, broker: Broker, emitter: Emitter, key: str, path: Path) -> None:
        async with listening(broker, key) as messages, Outbox(path, emitter, key) as box:
            for number in range(3):
                await box.publish("a/", number)
            await box.publish("b/", b"x" * 50_000)
            limit_pages(store_of(box))
            with pytest.raises(OutboxError, match="full"):
                await box.publish("a/", b"x" * 60_000)
            async with emitter:
                assert await take(messages, 3) == [0, 1, 2]
                await sent(box)
                await box.publish("a/", 3)  # in the space of the accepted messages
                assert await take(messages, 1) == [3]
                with pytest.raises(OutboxError, match="full"):
                    await box.publish("a/", b"x" * 65_000)
                    await box.publish("a/", b"x" * 65_000)

    async def test_changes_that_cannot_be_written_are_written_later(
        self,
        broker: Broker,
        emitter: Emitter,
        key: str,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("emitter_anyio.outbox._journal._RETRY_SECONDS", 0.001)
        errors = Calls()
        emitter.on("error", errors)
        async with (
            listening(broker, key) as messages,
            Outbox(path, emitter, key) as box,
        ):
            await box.publish("a/", 1)
            async with emitter:
                with read_only(store_of(box)):
                    assert await take(messages, 1) == [1]
                    (error,) = await errors.get(1)
                    assert "cannot write the outbox" in str(error)
                    await until(lambda: box.statistics().waiting == 0)
                    with pytest.raises(OutboxError, match="cannot write"):
                        await box.publish("a/", 2)
                    with pytest.raises(OutboxError, match="cannot write"):
                        await box.retry()
                    await broker.drop(broker.clients[-1])
                    async with emitter.stream("connect") as connected:
                        await connected.receive()
                await box.publish("a/", 3)
                assert await take(messages, 1) == [3]
                await sent(box)
        assert len(errors.values) == 1
        async with Outbox(path, emitter, key) as box:
            assert box.statistics().waiting == 0

    async def test_failed_read_is_reported_and_retried(
        self,
        broker: Broker,
        emitter: Emitter,
        key: str,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("emitter_anyio.outbox._journal._RETRY_SECONDS", 0.001)
        errors = Calls()
        emitter.on("error", errors)

        def fail(*_: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        async with (
            listening(broker, key) as messages,
            Outbox(path, emitter, key) as box,
        ):
            await box.publish("a/", 1)
            with monkeypatch.context() as patch:
                patch.setattr(store_module, "_fetch", fail)
                await emitter.__aenter__()
                (error,) = await errors.get(1)
                assert "cannot read the outbox" in str(error)
            assert await take(messages, 1) == [1]
            await emitter.__aexit__(None, None, None)

    async def test_full_outbox_raises(self, emitter: Emitter, key: str, path: Path) -> None:
        async with Outbox(path, emitter, key, max_size=1024) as box:
            await box.publish("a/", b"x" * 800)
            with pytest.raises(OutboxFullError, match="max_size"):
                await box.publish("a/", b"x" * 800)
            assert box.statistics().waiting == 1

    async def test_oldest_messages_are_given_up_for_space(
        self,
        broker: Broker,
        emitter: Emitter,
        key: str,
        path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async with (
            listening(broker, key) as messages,
            Outbox(path, emitter, key, max_size=1024, overflow="drop_oldest") as box,
        ):
            for number in range(10):
                await box.publish("a/", number)
            assert box.statistics().given_up == 3
            async with emitter:
                assert await take(messages, 7) == list(range(3, 10))
        assert "no space" in logged(caplog, logging.WARNING)[0].getMessage()

    async def test_many_publishes_share_transactions(
        self, emitter: Emitter, key: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = []
        apply = store_module.Store.apply

        def counted(self: Any, work: Any) -> Any:
            sizes.append(len(work.records))
            return apply(self, work)

        monkeypatch.setattr(store_module.Store, "apply", counted)
        async with Outbox(path, emitter, key) as box:
            async with anyio.create_task_group() as tasks:
                for number in range(1500):
                    tasks.start_soon(box.publish, "a/", number)
                for _ in range(300):
                    tasks.start_soon(box.publish, "b/", b"x" * 60_000)
            assert box.statistics().waiting == 1800
        assert max(sizes) <= 1000
        assert len([size for size in sizes if size]) < 20


class TestCancellation:
    async def test_publish_that_is_cancelled_before_it_is_written_is_not_stored(
        self, emitter: Emitter, key: str, path: Path
    ) -> None:
        async with Outbox(path, emitter, key) as box:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await box.publish("a/", 1)
            assert scope.cancelled_caught
            await box.publish("a/", 2)
            assert box.statistics().waiting == 1

    async def test_publish_cancelled_at_each_step_is_stored_or_not(
        self, broker: Broker, emitter: Emitter, key: str, path: Path
    ) -> None:
        async with Outbox(path, emitter, key) as box:
            for style in all_cancel_styles():
                for call in (
                    lambda: box.publish("a/", "cancelled"),
                    box.parked,
                    box.retry,
                    lambda: box.drop([]),
                ):
                    step = 0
                    while await cancel_at_step(call(), step, style):
                        step += 1
                    assert step
            await box.publish("a/", "last")
            waiting = box.statistics().waiting
            async with listening(broker, key) as messages, emitter:
                texts = [(await messages.receive()).as_string() for _ in range(waiting)]
            assert texts == ["cancelled"] * (waiting - 1) + ["last"]

    async def test_cancelled_block_waits_only_for_the_file(
        self, broker: Broker, key: str, path: Path
    ) -> None:
        emitter = connect_reconnecting(broker.url, disconnect_timeout=3600)
        with broker.lose("puback"):
            with anyio.CancelScope() as scope:
                async with emitter, Outbox(path, emitter, key) as box:
                    await box.publish("a/", 1)
                    scope.cancel()
                    await anyio.sleep_forever()
        async with Outbox(path, emitter, key) as box:
            assert box.statistics().waiting == 1

    @pytest.mark.parametrize("raises", [True, False])
    async def test_cancellation_while_leaving_closes_the_file(
        self, broker: Broker, key: str, path: Path, raises: bool
    ) -> None:
        emitter = connect_reconnecting(broker.url, disconnect_timeout=3600)
        box = Outbox(path, emitter, key)

        async def cancel_when_leaving() -> None:
            await until(lambda: box._tasks is not None and not box._open)
            scope.cancel()

        with broker.lose("puback"):
            async with emitter, anyio.create_task_group() as tasks:
                tasks.start_soon(cancel_when_leaving)
                with anyio.CancelScope() as scope:
                    try:
                        async with box:
                            await box.publish("a/", 1)
                            if raises:
                                raise ValueError("own")
                    except ValueError:
                        assert raises
                    else:
                        assert not raises
                assert scope.cancelled_caught or raises
                await emitter.flush()
                async with connect_once(broker.url) as other, Outbox(path, other, key) as box:
                    assert box.statistics().waiting == 1
                    await broker.drop(broker.clients[0])
                    scope = anyio.CancelScope()
                    tasks.cancel_scope.cancel()

    async def test_entering_that_is_cancelled_releases_the_file(
        self, emitter: Emitter, key: str, path: Path
    ) -> None:
        async def enter() -> None:
            async with Outbox(path, emitter, key):
                pass

        for style in all_cancel_styles():
            step = 0
            while await cancel_at_step(enter(), step, style):
                step += 1
            async with Outbox(path, emitter, key) as box:
                await box.publish("a/", 1)

    async def test_second_native_cancellation_while_entering_releases_the_outbox(
        self, emitter: Emitter, key: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if sniffio.current_async_library() != "asyncio":
            return
        begun, may_end = threading.Event(), threading.Event()
        open_store = store_module.Store.open

        def slow_open(self: Any) -> Any:
            begun.set()
            may_end.wait()
            return open_store(self)

        box = Outbox(path, emitter, key)
        with monkeypatch.context() as patch:
            patch.setattr(store_module.Store, "open", slow_open)
            task = asyncio.ensure_future(box.__aenter__())
            await to_thread.run_sync(begun.wait)
            for _ in range(2):
                task.cancel()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            may_end.set()
            await asyncio.wait([task])
        assert task.cancelled()
        async with box:
            await box.publish("a/", 1)

    async def test_native_cancellation_of_a_task_stops_the_outbox(
        self, emitter: Emitter, key: str, path: Path
    ) -> None:
        if sniffio.current_async_library() != "asyncio":
            return
        for name in ("file", "sending", "acknowledgements", "connection"):
            async with emitter, Outbox(path, emitter, key) as box:
                await box.publish("a/", 1)
                await sent(box)
                (task,) = (t for t in asyncio.all_tasks() if t.get_name().endswith(f": {name}"))
                task.cancel()
                await asyncio.wait([task])
                with pytest.raises(OutboxError, match="stopped"):
                    await box.publish("a/", 2)
                with pytest.raises(OutboxError, match="stopped"):
                    await box.parked()

    async def test_native_cancellation_while_the_file_is_written(
        self, emitter: Emitter, key: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if sniffio.current_async_library() != "asyncio":
            return
        begun, may_end = threading.Event(), threading.Event()
        apply, parked = store_module.Store.apply, store_module.Store.parked

        def slow(self: Any, work: Any) -> Any:
            begun.set()
            may_end.wait()
            return apply(self, work)

        def slow_parked(self: Any) -> Any:
            begun.set()
            may_end.wait()
            return parked(self)

        for call in ("publish", "parked"):
            begun.clear()
            may_end.clear()
            async with Outbox(path, emitter, key) as box:
                with monkeypatch.context() as patch:
                    patch.setattr(store_module.Store, "apply", slow)
                    patch.setattr(store_module.Store, "parked", slow_parked)
                    publishing: Any = box.publish("a/", 1) if call == "publish" else box.parked()
                    caller = asyncio.ensure_future(publishing)
                    waiting = [asyncio.ensure_future(box.publish("a/", 2)) for _ in range(2)]
                    await to_thread.run_sync(begun.wait)
                    late = [asyncio.ensure_future(box.parked()) for _ in range(2)]
                    await asyncio.sleep(0)
                    (task,) = (t for t in asyncio.all_tasks() if t.get_name().endswith(": file"))
                    task.cancel()
                    await asyncio.wait([task])
                    may_end.set()
                    for each in (caller, *waiting, *late):
                        with pytest.raises(OutboxError, match=r"unknown|stopped"):
                            await each

    async def test_failure_of_a_task_is_raised_bare(
        self, emitter: Emitter, key: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        defect = RuntimeError("a defect")

        def fail(*_: object) -> None:
            raise defect

        monkeypatch.setattr(Schedule, "next", fail)
        for error in (None, ValueError("own")):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                async with emitter, Outbox(path, emitter, key) as box:
                    await until(lambda: box._stopped)
                    with pytest.raises(OutboxError, match="stopped") as stopped:
                        await box.publish("a/", 1)
                    assert stopped.value.__cause__ is defect
                    if error is not None:
                        raise error
            assert caught.value is (error or defect)
            if error is not None:
                assert "a defect" in error.__notes__[0]


class TestOwner:
    async def test_client_belongs_to_the_event_loop_of_the_outbox(
        self, broker: Broker, emitter: Emitter, key: str, path: Path, tmp_path: Path
    ) -> None:
        async def enter_client() -> None:
            async with emitter:
                pytest.fail("it was entered")  # pragma: no cover

        async def enter_outbox() -> None:
            async with Outbox(tmp_path / "other.db", emitter, key):
                pytest.fail("it was entered")  # pragma: no cover

        async def publish() -> None:
            await box.publish("a/", 1)

        async def leave() -> None:
            await box.__aexit__(None, None, None)

        async with Outbox(path, emitter, key) as box:
            for use in (enter_client, enter_outbox, publish, leave, box.parked, box.__aenter__):
                with pytest.raises(WrongLoopError):
                    await to_thread.run_sync(run_elsewhere, use)
            assert await to_thread.run_sync(box.statistics) == EMPTY
            await box.publish("a/", 1)

    async def test_other_task_can_leave_only_after_the_first_has_ended(
        self, emitter: Emitter, key: str, path: Path
    ) -> None:
        if sniffio.current_async_library() != "asyncio":
            return
        box = Outbox(path, emitter, key)
        await asyncio.ensure_future(box.__aenter__())
        await box.publish("a/", 1)
        await box.__aexit__(None, None, None)
        async with box:
            leaving = asyncio.ensure_future(box.__aexit__(None, None, None))
            with pytest.raises(RuntimeError, match="another task"):
                await leaving
            with pytest.raises(RuntimeError, match="already entered"):
                await box.__aenter__()
        async with box:
            assert box.statistics().waiting == 1


def run_elsewhere(use: Callable[[], Awaitable[object]]) -> None:
    async def main() -> None:
        await use()

    asyncio.run(main())


class TestArguments:
    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            *(("path", value) for value in (5, None, b"x", "", "a\0b")),
            *(("emitter", value) for value in (None, "mqtt://h", Emitter)),
            *(("key", value) for value in (None, 5, b"k", "", "k/", lambda: NO_KEY)),
            *(("max_size", value) for value in (None, 1023, -1, 1.5, "5", True, 2**63)),
            *(("max_age", value) for value in (-1, float("nan"), "1", True, 10**400)),
            *(("overflow", value) for value in (None, 5, "block", "drop_newest")),
        ],
    )
    def test_invalid_argument_is_rejected(self, path: Path, argument: str, value: Any) -> None:
        arguments = {"path": path, "emitter": connect("mqtt://h"), "key": NO_KEY, argument: value}
        with pytest.raises((TypeError, ValueError), match=argument):
            Outbox(**arguments)

    def test_key_function_without_a_signature_is_accepted(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise ValueError

        monkeypatch.setattr("inspect.signature", fail)
        Outbox(path, connect("mqtt://h"), key_of_nothing)

    def test_key_function_that_cannot_be_hashed_is_rejected(self, path: Path) -> None:
        class Unhashable:
            __hash__ = None  # type: ignore[assignment]

            async def __call__(self, channel: str) -> str:
                raise NotImplementedError

        with pytest.raises(TypeError, match="hash"):
            Outbox(path, connect("mqtt://h"), Unhashable())

    def test_repr_shows_the_path_and_not_the_key(self, path: Path) -> None:
        box = Outbox(path, connect("mqtt://h"), NO_KEY)
        assert repr(box) == f"<Outbox {str(path)!r}>"

    async def test_relative_path_is_resolved_when_entering(
        self, emitter: Emitter, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(path.parent)
        async with Outbox("out.db", emitter, NO_KEY):
            assert path.exists()  # noqa: ASYNC240 - a short call

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            (("a/", object()), TypeError),
            (("a/", "\udcff"), ValueError),
            (("a/+/", 1), InvalidChannelError),
            (("", 1), InvalidChannelError),
            ((5, 1), TypeError),
            (("a/", b"x" * 65_500), MessageTooLargeError),
            (("a/", 1, -1), ValueError),
            (("a/", 1, 1.5), TypeError),
        ],
    )
    async def test_invalid_message_is_not_stored(
        self, emitter: Emitter, path: Path, arguments: Any, error: type[Exception]
    ) -> None:
        for key in (NO_KEY, key_of_nothing):
            async with Outbox(path, emitter, key) as box:
                with pytest.raises(error):
                    await box.publish(*arguments)
                assert box.statistics() == EMPTY

    @pytest.mark.parametrize("name", ["retain", "echo"])
    async def test_invalid_flag_is_not_stored(
        self, emitter: Emitter, path: Path, name: str
    ) -> None:
        async with Outbox(path, emitter, NO_KEY) as box:
            with pytest.raises(TypeError, match=name):
                options: Any = {name: 1}
                await box.publish("a/", 1, **options)
            assert box.statistics() == EMPTY

    @pytest.mark.parametrize("messages", [5, "x", [5], ["x"]])
    async def test_invalid_messages_are_rejected(
        self, emitter: Emitter, path: Path, messages: Any
    ) -> None:
        async with Outbox(path, emitter, NO_KEY) as box:
            for method in (box.retry, box.drop):
                with pytest.raises(TypeError, match="ParkedMessage"):
                    await method(messages)
            with pytest.raises(TypeError, match="ParkedMessage"):
                await box.drop(None)  # type: ignore[arg-type]


async def key_of_nothing(channel: str) -> str:
    raise NotImplementedError


async def test_echo_and_retain_reach_the_broker(
    broker: Broker, emitter: Emitter, key: str, path: Path
) -> None:
    async with Outbox(path, emitter, key) as box, emitter:
        async with emitter.subscribe(key, "a/") as messages:
            await box.publish("a/", 1, echo=False)
            await box.publish("a/", 2, retain=True)
            assert await take(messages, 1) == [2]
        stored = [message.as_object() async for message in emitter.history(key, "a/")]
        assert stored == [2]


async def test_json_encoder_of_the_client_is_used(broker: Broker, key: str, path: Path) -> None:
    emitter = connect_reconnecting(broker.url, json_encoder=str)
    async with listening(broker, key) as messages, emitter, Outbox(path, emitter, key) as box:
        await box.publish("a/", {"path": Path("x")})
        assert await take(messages, 1) == [{"path": "x"}]


async def test_reconnect_sends_waiting_messages(
    broker: Broker, emitter: Emitter, key: str, path: Path
) -> None:
    async with listening(broker, key) as messages, emitter, Outbox(path, emitter, key) as box:
        async with anyio.create_task_group() as tasks:
            for number in range(200):
                tasks.start_soon(box.publish, "a/", number)
                await anyio.lowlevel.checkpoint()
                if number == 100:
                    tasks.start_soon(emitter.reconnect)
        received = list(dict.fromkeys(await take(messages, 200)))
        assert received == list(range(len(received)))
        await sent(box)


async def test_two_outboxes_share_a_client(
    broker: Broker, emitter: Emitter, key: str, path: Path, tmp_path: Path
) -> None:
    async with listening(broker, key) as messages:
        async with (
            Outbox(path, emitter, key) as one,
            Outbox(tmp_path / "two.db", emitter, key) as two,
            emitter,
        ):
            await one.publish("a/", 1)
            await two.publish("a/", 2)
        assert sorted(await take(messages, 2)) == [1, 2]


async def test_statistics_while_the_outbox_changes(emitter: Emitter, key: str, path: Path) -> None:
    async with Outbox(path, emitter, key) as box:
        changes = box._journal._changes

        class Message:
            @property
            def weight(self) -> int:
                changes.clear()  # as the event loop might do while another thread reads
                return 0

        changes.update({id: (Message(), "accepted") for id in range(2)})  # type: ignore[misc]
        assert box.statistics().size == 0


async def test_while_disconnected_messages_wait(
    broker: Broker, emitter: Emitter, key: str, path: Path
) -> None:
    async with emitter, Outbox(path, emitter, key) as box:
        async with while_disconnected(emitter, broker):
            await box.publish("a/", 1)
            assert box.statistics().waiting == 1
        await sent(box)


async def test_connection_is_held_until_the_last_release() -> None:
    holds, released = Holds(), []

    async def wait() -> None:
        await holds.wait_released()
        released.append(holds.held)

    holds.set(1, held=True)
    holds.set(2, held=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        holds.set(1, held=False)
        await anyio.wait_all_tasks_blocked()
        assert released == []
        holds.set(2, held=False)
    assert released == [False, False]
