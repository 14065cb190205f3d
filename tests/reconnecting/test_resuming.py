"""Gaps, and resuming the messages stored during an outage."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from operator import attrgetter
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError
from anyio.abc import ByteStream, ByteStreamConnectable
from anyio.lowlevel import checkpoint
from anyio.streams.stapled import StapledByteStream

from emitter_anyio import (
    Backoff,
    ConnectOptions,
    Emitter,
    EmitterMessage,
    EventStream,
    Gap,
    InvalidChannelError,
    SlowConsumerError,
    UnauthorizedError,
    connect,
)
from emitter_anyio._streams import Sender
from emitter_anyio.testing import Broker
from tests.client.tools import Calls
from tests.support.connections import connect_reconnecting, force_reconnect, while_disconnected

Items = EventStream[EmitterMessage | Gap]


def describe(item: EmitterMessage | Gap) -> str:
    """Describe a message, with ``*`` if it was replayed, or a gap and what was resumed."""
    if isinstance(item, Gap):
        return f"gap of {item.resumed}{'' if item.complete else ', and more'}"
    assert item.replayed == (item.id is not None)
    return item.as_string() + "*" * item.replayed


async def take(stream: EventStream[EmitterMessage] | Items, count: int) -> list[str]:
    return [describe(await stream.receive()) for _ in range(count)]


async def store(broker: Broker, *texts: str, channel: str = "a/") -> None:
    for text in texts:
        await broker.publish(channel, text, ttl=60)


@asynccontextmanager
async def restored_but_unanswered(emitter: Emitter, broker: Broker) -> AsyncGenerator[None]:
    """Store a message during an outage, and reconnect to a broker that holds its replies."""
    async with emitter.stream("connect") as connected:
        with broker.hold("reply", "puback"):
            async with while_disconnected(emitter, broker):
                await store(broker, "missed")
            while not emitter.statistics().pending:
                await checkpoint()
            yield
        await connected.receive()


# Gaps


async def test_gap_is_marked_in_its_place(broker: Broker, emitter: Emitter, key: str) -> None:
    async with emitter.subscribe(key, "a/", mark_gaps=True) as messages:
        await store(broker, "before")
        await emitter.flush()
        async with while_disconnected(emitter, broker):
            await store(broker, "lost")
        await store(broker, "after")
        assert await take(messages, 1) == ["before"]
        gap = await messages.receive()
        assert gap == Gap("a/")
        assert await take(messages, 1) == ["after"]
        assert messages.statistics().gaps == 1


async def test_mark_gaps_is_rejected_for_an_awaited_subscription(
    emitter: Emitter, key: str, broker: Broker
) -> None:
    with pytest.raises(ValueError, match="mark_gaps"):
        await emitter.subscribe(key, "a/", mark_gaps=True)
    await emitter.flush()
    assert broker.clients[0].subscriptions == []


async def test_gap_needs_no_space_in_the_buffer(broker: Broker, emitter: Emitter, key: str) -> None:
    async with emitter.subscribe(key, "a/", buffer=1, mark_gaps=True) as messages:
        await store(broker, "one")
        await emitter.flush()
        await force_reconnect(emitter, broker)
        assert await take(messages, 2) == ["one", "gap of 0, and more"]


# Resumed messages


async def test_resumed_messages_come_before_live_ones(
    broker: Broker, emitter: Emitter, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "emitter_anyio")
    await store(broker, "old")
    async with emitter.subscribe(key, "a/", 0, resume=True, mark_gaps=True) as messages:
        async with while_disconnected(emitter, broker):
            await store(broker, "1", "2", "3")
            await broker.publish("a/", "not stored")
        assert await take(messages, 4) == ["gap of 3", "1*", "2*", "3*"]
        await store(broker, "4")
        assert await take(messages, 1) == ["4"]
        await force_reconnect(emitter, broker)
        # The resume position includes replayed messages immediately, live ones after a renewal.
        assert await take(messages, 2) == ["gap of 1", "4*"]
        await force_reconnect(emitter, broker)
        assert await take(messages, 1) == ["gap of 0"]
    assert any("'a/'" in text and "stored messages: 3" in text for text in caplog.messages)


async def test_subchannels_are_resumed(broker: Broker, emitter: Emitter, key: str) -> None:
    async with emitter.subscribe(key, "a/", resume=True) as messages:
        async with while_disconnected(emitter, broker):
            await store(broker, "1", channel="a/b/")
            await store(broker, "2", channel="a/c/d/")
            await store(broker, "elsewhere", channel="b/")
        message = await messages.receive()
        assert (message.channel, message.as_string()) == ("a/b/", "1")
        assert repr(message) == "<EmitterMessage channel='a/b/' binary=b'1', replayed>"
        assert message.id is not None
        message = await messages.receive()
        assert (message.channel, message.as_string()) == ("a/c/d/", "2")


async def test_handlers_get_resumed_messages_first(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    calls, elsewhere = Calls(), Calls()
    emitter.on("message", calls)
    emitter.on("message", elsewhere, channel="b/")
    await emitter.subscribe(key, "a/", resume=True)
    async with restored_but_unanswered(emitter, broker):
        await broker.publish("a/", "live")
    assert [describe(message) for message in await calls.get(2)] == ["missed*", "live"]
    assert not elsewhere.values
    await emitter.unsubscribe(key, "a/")
    await force_reconnect(emitter, broker)
    await emitter.flush()
    assert broker.clients[0].subscriptions == []
    assert len(calls.values) == 2


async def test_overlapping_subscriptions_resume_independently(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with (
        emitter.subscribe(key, "a/", resume=True) as wide,
        emitter.subscribe(key, "a/b/", resume=True) as narrow,
        emitter.subscribe(key, "a/b/") as plain,
    ):
        async with while_disconnected(emitter, broker):
            await store(broker, "1", channel="a/b/")
            await store(broker, "2")
        assert await take(wide, 2) == ["1*", "2*"]
        assert await take(narrow, 1) == ["1*"]
        await store(broker, "3", channel="a/b/")
        for stream in (wide, narrow, plain):
            assert await take(stream, 1) == ["3"]


async def test_several_pages_are_resumed_in_order(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.subscribe(key, "a/", resume=True) as messages:
        async with while_disconnected(emitter, broker):
            await store(broker, *map(str, range(300)))
        assert await take(messages, 300) == [f"{number}*" for number in range(300)]


async def test_large_messages_are_resumed(broker: Broker, emitter: Emitter, key: str) -> None:
    large = [str(number) * 15000 for number in range(9)]
    async with emitter.subscribe(key, "a/", resume=True) as messages:
        async with while_disconnected(emitter, broker):
            await store(broker, *large)
        assert await take(messages, 9) == [f"{text}*" for text in large]


@pytest.mark.parametrize("ahead", [3600, -3600])
async def test_resuming_works_when_the_brokers_clock_is_wrong(
    broker: Broker, emitter: Emitter, key: str, ahead: float
) -> None:
    broker._exchange.cluster.advance(ahead)
    await store(broker, "old")
    async with emitter.subscribe(key, "a/", 0, resume=True) as messages:
        for text in "12":
            async with while_disconnected(emitter, broker):
                await store(broker, text)
            assert await take(messages, 1) == [f"{text}*"]


# Incomplete resumption


async def test_resume_limit_limits_the_resumed_messages(
    broker: Broker, emitter: Emitter, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with emitter.subscribe(
        key, "a/", resume=True, resume_limit=3, mark_gaps=True
    ) as messages:
        async with while_disconnected(emitter, broker):
            await store(broker, *"12345")
        gap = await messages.receive()
        assert isinstance(gap, Gap)
        assert not gap.complete
        assert "resume_limit=3" in (gap.reason or "")
        assert gap.resumed == 3
        assert await take(messages, 3) == ["3*", "4*", "5*"]
        async with while_disconnected(emitter, broker):
            await store(broker, *"678")
        assert await take(messages, 4) == ["gap of 3", "6*", "7*", "8*"]
    assert any("'a/'" in text and "resume_limit=3" in text for text in caplog.messages)


async def test_message_too_large_for_history_makes_the_gap_incomplete(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.subscribe(key, "a/", resume=True, mark_gaps=True) as messages:
        async with while_disconnected(emitter, broker):
            await store(broker, "1", "x" * 60000, "2", "3")
        gap = await messages.receive()
        assert isinstance(gap, Gap)
        assert gap.reason is not None
        assert "too large" in gap.reason
        assert await take(messages, 3) == ["1*", "2*", "3*"]
        await store(broker, "live")
        assert await take(messages, 1) == ["live"]


@pytest.mark.parametrize("older", [["older"], []])
async def test_newest_message_too_large_for_history_does_not_prevent_resuming(
    broker: Broker, emitter: Emitter, key: str, older: list[str]
) -> None:
    await store(broker, *older)
    broker.advance(2)
    await store(broker, "x" * 60000)
    async with emitter.subscribe(key, "a/", 0, resume=True) as messages:
        async with while_disconnected(emitter, broker):
            await store(broker, "1")
        assert await take(messages, 1) == ["1*"]


async def test_messages_older_than_one_too_large_for_history_are_resumed(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.subscribe(key, "a/", resume=True, mark_gaps=True) as messages:
        async with while_disconnected(emitter, broker):
            for text in ("1", "x" * 60000, "2"):
                await store(broker, text)
                broker.advance(2)
        assert await take(messages, 3) == ["gap of 2, and more", "1*", "2*"]


async def test_resuming_from_an_expired_message_is_incomplete(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    await store(broker, "known")
    async with emitter.subscribe(key, "a/", 0, resume=True, mark_gaps=True) as messages:
        async with while_disconnected(emitter, broker):
            broker.advance(61)
            await store(broker, "1")
        gap = await messages.receive()
        assert isinstance(gap, Gap)
        assert (gap.resumed, gap.complete) == (1, False)
        assert "has expired" in str(gap.reason)
        assert await take(messages, 1) == ["1*"]
        # The resume position is now the replayed message, so the next gap is complete.
        async with while_disconnected(emitter, broker):
            await store(broker, "2")
        assert await take(messages, 2) == ["gap of 1", "2*"]


async def test_key_without_load_permission_is_refused_when_subscribing(
    broker: Broker, emitter: Emitter
) -> None:
    key = broker.keygen("a/", "rw")
    with pytest.raises(UnauthorizedError, match="history"):
        async with emitter.subscribe(key, "a/", resume=True):
            raise AssertionError("entered")
    with pytest.raises(UnauthorizedError, match="history"):
        await emitter.subscribe(key, "a/", resume=True)
    assert broker.clients[0].subscriptions == []


async def test_subscribe_rejects_options_that_cannot_be_resumed(emitter: Emitter, key: str) -> None:
    with pytest.raises(ValueError, match=r"resume.*group"):
        emitter.subscribe(key, "a/", group="g", resume=True)
    with pytest.raises(InvalidChannelError, match="literal first level"):
        emitter.subscribe(key, "+/a/", resume=True)
    with pytest.raises(ValueError, match="resume_limit"):
        emitter.subscribe(key, "a/", resume=True, resume_limit=-1)


# Events during resumption


@pytest.mark.parametrize(
    ("overflow", "left"),
    [("raise", "01"), ("drop_oldest", "89"), ("drop_newest", "01"), ("block", "01")],
)
async def test_messages_held_during_resumption_are_limited_by_the_buffer(
    broker: Broker, emitter: Emitter, key: str, overflow: Any, left: str
) -> None:
    async with emitter.subscribe(key, "a/", buffer=2, overflow=overflow, resume=True) as messages:
        async with restored_but_unanswered(emitter, broker):
            for text in "0123456789":
                await broker.publish("a/", text)
            while messages.statistics().dropped < 8:
                await checkpoint()
            assert messages.statistics().current_buffer_used == 2
            with pytest.raises(anyio.WouldBlock):
                messages.receive_nowait()
        assert await take(messages, 3) == ["missed*", *left]
        if overflow in ("raise", "block"):
            with pytest.raises(SlowConsumerError) as caught:
                await messages.receive()
            assert caught.value.dropped == 8
        await broker.publish("a/", "on")
        assert await take(messages, 1) == ["on"]


async def test_overflow_is_reported_on_its_own_side_of_the_gap(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.subscribe(key, "a/", buffer=1, resume=True) as messages:
        for text in ("before", "too many"):
            await broker.publish("a/", text)
        while messages.statistics().dropped < 1:
            await checkpoint()
        async with restored_but_unanswered(emitter, broker):
            await broker.publish("a/", "after")
            while messages.statistics().dropped < 2:
                await checkpoint()
        received = []
        for _ in range(4):
            try:
                received += await take(messages, 1)
            except SlowConsumerError as error:
                received.append(f"{error.dropped} missing")
        assert received == ["before", "1 missing", "missed*", "1 missing"]


async def test_unread_resumed_messages_count_towards_resume_limit(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.subscribe(
        key, "a/", buffer=1, resume=True, resume_limit=3, mark_gaps=True
    ) as messages:
        for texts, buffered in (("12", 3), ("34", 4), ("56", 5)):
            async with while_disconnected(emitter, broker):
                await store(broker, *texts)
            while messages.statistics().current_buffer_used < buffered:
                await checkpoint()
        assert await take(messages, 3) == ["gap of 2", "1*", "2*"]
        first, second = await messages.receive(), await messages.receive()
        assert isinstance(first, Gap)
        assert isinstance(second, Gap)
        assert not first.complete
        assert not second.complete
        # Nothing is lost: there is space at the next resumption.
        await force_reconnect(emitter, broker)
        gap = await messages.receive()
        assert isinstance(gap, Gap)
        assert (gap.resumed, gap.complete) == (3, False)
        assert await take(messages, 3) == ["4*", "5*", "6*"]


async def test_resumed_messages_are_limited_to_8_mib(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.subscribe(key, "a/", resume=True, mark_gaps=True) as messages:
        async with while_disconnected(emitter, broker):
            # 8 MiB hold about 209 of these messages.
            await store(broker, *("x" * 40_000 for _ in range(215)))
        gap = await messages.receive()
        assert isinstance(gap, Gap)
        assert not gap.complete
        assert "8 MiB" in str(gap.reason)
        assert 200 < gap.resumed < 215


@pytest.mark.parametrize("overflow", ["raise", "drop_oldest", "drop_newest"])
async def test_bytes_held_during_resumption_overflow_as_usual(
    broker: Broker, emitter: Emitter, key: str, overflow: Any
) -> None:
    # 8 MiB are held, so about 139 of these messages.
    sent = [str(number).ljust(60_000) for number in range(150)]
    async with emitter.subscribe(key, "a/", overflow=overflow, resume=True) as messages:
        async with restored_but_unanswered(emitter, broker):
            for number, text in enumerate(sent):
                await broker.publish("a/", text)
                while (
                    sum(attrgetter("current_buffer_used", "dropped")(messages.statistics()))
                    <= number
                ):
                    await checkpoint()
        dropped = messages.statistics().dropped
        assert 0 < dropped < 20
        left = sent[dropped:] if overflow == "drop_oldest" else sent[:-dropped]
        assert await take(messages, 1 + len(left)) == ["missed*", *left]
        if overflow == "raise":
            with pytest.raises(SlowConsumerError) as caught:
                await messages.receive()
            assert caught.value.dropped == dropped


async def test_connection_lost_while_resuming_resumes_again(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.subscribe(key, "a/", resume=True, mark_gaps=True) as messages:
        async with restored_but_unanswered(emitter, broker):
            await store(broker, "held")
            while messages.statistics().current_buffer_used < 1:
                await checkpoint()
            async with emitter.stream("connect") as connected:
                await broker.drop()
                await connected.receive()
        assert await take(messages, 4) == ["gap of 2", "missed*", "held*", "held"]
        # The gap of the second loss: its stored messages were resumed with the first gap.
        assert await messages.receive() == Gap("a/", complete=True)
        assert messages.statistics().gaps == 2


async def test_gaps_that_are_held_back_do_not_count_towards_resume_limit(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.subscribe(
        key, "a/", resume=True, resume_limit=1, mark_gaps=True
    ) as messages:
        async with restored_but_unanswered(emitter, broker):
            for _ in range(3):
                await broker.drop()
                while not emitter.statistics().pending:
                    await checkpoint()
        assert await take(messages, 2) == ["gap of 1", "missed*"]


class ShortConnections(ByteStreamConnectable):
    """Connections that are lost after a number of received bytes."""

    def __init__(self, broker: Broker, byte_limit: int) -> None:
        self._broker = broker
        self._byte_limit = byte_limit
        self.count = 0

    async def connect(self) -> ByteStream:
        self.count += 1
        return ShortStream(await self._broker.connectable().connect(), self._byte_limit)


class ShortStream(StapledByteStream):
    def __init__(self, stream: ByteStream, byte_limit: int) -> None:
        super().__init__(stream, stream)
        self._left = byte_limit

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if self._left <= 0:
            raise BrokenResourceError
        data = await super().receive(min(max_bytes, self._left))
        self._left -= len(data)
        return data


async def test_resuming_completes_although_no_connection_lasts_for_it(broker: Broker) -> None:
    connections = ShortConnections(broker, 50_000)
    key = broker.keygen("a/", "rl")
    async with (
        connect_reconnecting(connectable=connections) as emitter,
        emitter.subscribe(key, "a/", resume=True, resume_limit=9000, mark_gaps=True) as messages,
    ):
        async with while_disconnected(emitter, broker):
            for number in range(3000):
                await broker.publish("a/", str(number), ttl=3600)
                broker.advance(number % 20 == 0)
        assert await take(messages, 3001) == ["gap of 3000", *(f"{n}*" for n in range(3000))]
    assert 5 < connections.count < 30


async def test_subscription_left_while_resuming_delays_no_other(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    await emitter.subscribe(key, "b/")
    with ExitStack() as stack:
        async with (
            emitter.subscribe(key, "a/", resume=True),
            emitter.stream("connect") as connected,
        ):
            stack.enter_context(broker.hold("reply", "puback"))
            await broker.drop()
            await connected.receive()
        await emitter.publish(key, "b/", "live")
        assert [describe(message) for message in await calls.get(1)] == ["live"]
        await emitter.unsubscribe(key, "b/")
        assert broker.clients[0].subscriptions == []


async def test_subscription_left_as_resuming_starts_is_unsubscribed(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.stream("connect") as connected:
        for _ in range(3):
            async with emitter.subscribe(key, "a/", resume=True):
                await broker.drop()
                await connected.receive()
    await emitter.flush()
    assert broker.clients[0].subscriptions == []


async def test_leaving_a_subscription_immediately_leaves_no_task(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with emitter.subscribe(key, "a/", resume=True):
        pass
    while any("_keep_watermark" in (task.name or "") for task in anyio.get_running_tasks()):
        await checkpoint()


async def test_client_can_be_left_while_resuming(broker: Broker, key: str) -> None:
    received: list[str] = []
    async with connect_reconnecting(broker.url, disconnect_timeout=0.05) as emitter:
        async with emitter.subscribe(key, "a/", resume=True) as messages:
            async with emitter.stream("connect") as connected:
                with broker.hold("reply", "puback"):
                    await broker.drop()
                    await connected.receive()
                    await store(broker, "live")
                    await emitter.flush()
                    await emitter.disconnect()
            received += [describe(message) async for message in messages]
    assert received == ["live"]


async def test_sender_orders_resumed_replayed_and_held_messages(anyio_backend: object) -> None:
    send: Sender[int] = Sender("test", 10, "raise")
    send.push(2)
    send.hold()
    send.push(4)
    send.put_ahead([3])
    send.put_in_front([0, 1])
    send.release()
    with EventStream[int](send) as stream:
        assert [stream.receive_nowait() for _ in range(5)] == [0, 1, 2, 3, 4]


# Random losses


@pytest.mark.parametrize("seed", range(5))
async def test_every_stored_message_is_received(broker: Broker, key: str, seed: int) -> None:
    rng = random.Random(seed)
    count = 150
    received: list[EmitterMessage | Gap] = []

    async def consume(emitter: Emitter, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with emitter.subscribe(
            key, "a/", resume=True, mark_gaps=True, buffer=count
        ) as messages:
            task_status.started()
            async for item in messages:
                received.append(item)
                if isinstance(item, EmitterMessage) and item.binary == b"end":
                    return
                if rng.random() < 0.1:
                    await checkpoint()

    options: ConnectOptions = {"client_id": "subscriber", "reconnect": Backoff(0, 0.002)}
    async with connect(broker.url) as publisher, connect(broker.url, **options) as emitter:
        async with anyio.create_task_group() as tasks:
            await tasks.start(lambda task_status: consume(emitter, task_status=task_status))
            for number in range(count):
                await publisher.publish(key, "a/", str(number), 60, qos=rng.choice([0, 1]))
                if rng.random() < 0.1:
                    await publisher.flush()
                    while not any(client.client_id == "subscriber" for client in broker.clients):
                        await checkpoint()
                    # The next loss might come while it connects, restores, resumes or receives.
                    for _ in range(rng.randrange(400)):
                        await checkpoint()
                    await broker.drop("subscriber")
                while rng.random() < 0.3:
                    await checkpoint()
            await publisher.publish(key, "a/", "end", 60, qos=1)

    connections: list[list[EmitterMessage]] = [[]]
    for item in received:
        if isinstance(item, Gap):
            assert item.complete
            connections.append([])
        elif item.binary != b"end":
            connections[-1].append(item)
    assert len(connections) > 3
    numbers = [int(message.as_string()) for connection in connections for message in connection]
    assert set(numbers) == set(range(count))
    live = [int(m.as_string()) for connection in connections for m in connection if not m.replayed]
    assert live == sorted(set(live))
    for connection in connections:
        replayed = [int(message.as_string()) for message in connection if message.replayed]
        assert replayed == sorted(set(replayed))
        assert all(message.replayed for message in connection[: len(replayed)])
