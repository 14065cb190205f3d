"""A flood of packets or a hot loop does not starve other tasks. The tests count turns, not time."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import Emitter, EmitterMessage, EventStream, RequestTimeoutError
from emitter_anyio.testing import Broker
from tests.support import packets
from tests.support.connections import connect_once
from tests.support.memory import MemoryStream
from tests.support.peer import PUBLISH, SUBSCRIBE, Peer, memory_peer, serving

MAX_PER_TURN: Final = 64
"""
The most messages or calls between two turns of another task.

The tests allow twice as many because Trio runs the tasks of a turn in any order.
"""

PACKET: Final = packets.publish("a/", b"x")
LARGE_PACKET: Final = packets.publish("a/", bytes(200))
PACKETS_PER_READ: Final = 65536 // len(PACKET)
"""The number of packets in one read of the client, which delivers them together if they fit."""

BUFFER: Final = 1024

# A flood from a peer


class Flood:
    """A peer that sends packets endlessly after the client has subscribed."""

    def __init__(self, packets: bytes = PACKET * 20_000, subscriptions: int = 1) -> None:
        self._packets = packets
        self._subscriptions = subscriptions

    async def run(self, peer: Peer) -> None:
        await peer.accept()
        for _ in range(self._subscriptions):
            await peer.answer(await peer.until(SUBSCRIBE))
        while True:
            await peer.send(self._packets)
            await checkpoint()  # send() of an in-memory stream might return immediately


@asynccontextmanager
async def connect_to_flood(transport: str, flood: Flood, **more: Any) -> AsyncGenerator[Emitter]:
    async with serving(transport, flood.run) as options, connect_once(**options, **more) as emitter:
        yield emitter


class CountingReader:
    """A task that reads a stream endlessly and counts the messages."""

    def __init__(self) -> None:
        self.count = 0

    async def run(self, messages: EventStream[EmitterMessage]) -> None:
        async for _ in messages:
            self.count += 1


def arrived(messages: EventStream[EmitterMessage]) -> int:
    """Return how many messages have entered a stream."""
    figures = messages.statistics()
    return figures.received + figures.current_buffer_used


@pytest.mark.parametrize("transport", ["tcp", "memory"])
async def test_flood_does_not_starve_other_tasks(anyio_backend: object, transport: str) -> None:
    reader = CountingReader()
    async with connect_to_flood(transport, Flood()) as emitter:
        async with emitter.subscribe("k", "a/") as messages, anyio.create_task_group() as tasks:
            tasks.start_soon(reader.run, messages)
            max_read = max_delivered = 0
            while reader.count < 20_000:
                read, delivered = reader.count, arrived(messages)
                await checkpoint()
                max_read = max(max_read, reader.count - read)
                max_delivered = max(max_delivered, arrived(messages) - delivered)
            tasks.cancel_scope.cancel()
    assert max_read <= 2 * MAX_PER_TURN + 1
    assert max_delivered <= 2 * BUFFER


async def test_flood_without_receiver_does_not_starve_other_tasks(
    anyio_backend: object,
) -> None:
    async with connect_to_flood("tcp", Flood()) as emitter:
        await emitter.subscribe("k", "a/")
        max_per_turn = 0
        while (received := emitter.statistics().received) < 50_000:
            await checkpoint()
            max_per_turn = max(max_per_turn, emitter.statistics().received - received)
    assert max_per_turn <= 2 * 4096


MAX_OTHER_PER_TURN: Final = 256
"""The most packets of other kinds, or WebSocket frames, that are handled in one turn."""

SMALL: Final = {
    "unsuback": packets.unsuback(7),
    "suback": packets.suback(7, 0),
    "puback": packets.puback(7),
    "pingresp": packets.PINGRESP,
    "message of QoS 1": packets.publish("b/", b"", 7),
    "system message": packets.publish("emitter/x/", b"{}"),
    "topic that is not UTF-8": packets.publish(b"\xff", b""),
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.fast_path] * (kind == "puback")) for kind in SMALL],
)
async def test_many_small_packets_in_one_read_do_not_starve_other_tasks(
    anyio_backend: object, kind: str
) -> None:
    count = 32 * 1024 // len(SMALL[kind])

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.answer(await peer.until(SUBSCRIBE))
        await peer.send(SMALL[kind] * count)
        await peer.answer_all()

    def handled() -> int:
        figures = emitter.statistics()
        return figures.nonsense + figures.received

    async with serving("tcp", script) as options, connect_once(**options) as emitter:
        await emitter.subscribe("k", "a/")
        max_per_turn, before = 0, handled()
        while before < count:
            await checkpoint()
            max_per_turn, before = max(max_per_turn, handled() - before), handled()
    assert max_per_turn <= 2 * MAX_OTHER_PER_TURN + 1


@pytest.mark.parametrize("frame", [b"\x89\0", b"\x82\0"], ids=["ping", "empty"])
async def test_many_small_frames_in_one_read_do_not_starve_other_tasks(
    anyio_backend: object, frame: bytes
) -> None:
    count = 16 * 1024

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.answer(await peer.until(SUBSCRIBE))
        stream: Any = peer.stream
        await stream.stream.send(frame * count)
        await peer.answer_all()

    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    async with serving("ws", script) as options, connect_once(**options) as emitter:
        await emitter.subscribe("k", "a/")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count_turns)
            # The PINGRESP follows the frames.
            await emitter.flush(timeout=None)
            tasks.cancel_scope.cancel()
    assert turns >= count // (2 * MAX_OTHER_PER_TURN)


async def test_packets_after_connack_do_not_starve_other_tasks(
    anyio_backend: object,
) -> None:
    count = 1000

    async def script(peer: Peer) -> None:
        await peer.packet()
        await peer.send(packets.CONNACK + packets.unsuback(7) * count)
        await peer.answer_all()

    async with serving("tcp", script) as options, connect_once(**options) as emitter:
        max_per_turn, before = 0, emitter.statistics().nonsense
        while before < count:
            await checkpoint()
            nonsense = emitter.statistics().nonsense
            max_per_turn, before = max(max_per_turn, nonsense - before), nonsense
    assert max_per_turn <= 2 * MAX_OTHER_PER_TURN + 1


@pytest.mark.parametrize("packet", [PACKET, LARGE_PACKET])
async def test_read_size_grows_in_a_flood(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch, packet: bytes
) -> None:
    sizes = [0]
    receive = MemoryStream.receive

    async def recording_receive(stream: MemoryStream, max_bytes: int = 65536) -> bytes:
        sizes.append(max_bytes)
        return await receive(stream, max_bytes)

    flood = Flood(packet * (1_000_000 // len(packet)))
    async with memory_peer(flood.run, capacity=1_000_000) as connectable:
        async with connect_once(connectable=connectable) as emitter:
            monkeypatch.setattr(MemoryStream, "receive", recording_receive)
            await emitter.subscribe("k", "a/")
            while len(sizes) < 10:
                await checkpoint()
    assert max(sizes) == 262144


async def test_deadline_expires_during_a_flood(anyio_backend: object) -> None:
    # A deadline is evaluated after the reader has read what has arrived, which here never ends.
    reader = CountingReader()
    # Disconnecting waits for the acknowledgement that never comes.
    async with connect_to_flood("tcp", Flood(), disconnect_timeout=0.1) as emitter:
        async with emitter.subscribe("k", "a/") as messages, anyio.create_task_group() as tasks:
            tasks.start_soon(reader.run, messages)
            while reader.count < 5000:
                await checkpoint()
            with pytest.raises(RequestTimeoutError):
                await emitter.publish("k", "a/", "x", qos=1, timeout=0)
            count_at_timeout = reader.count
            while reader.count == count_at_timeout:
                await checkpoint()
            tasks.cancel_scope.cancel()


async def test_flood_on_one_subscription_does_not_delay_another(anyio_backend: object) -> None:
    rare = packets.publish("b/", b"x")
    flood_reader, read_before = CountingReader(), list[int]()
    async with connect_to_flood("tcp", Flood(PACKET * 999 + rare, 2)) as emitter:
        async with (
            emitter.subscribe("k", "a/") as flooded,
            emitter.subscribe("k", "b/") as rare_messages,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(flood_reader.run, flooded)
            for _ in range(20):
                await rare_messages.receive()
                read_before.append(flood_reader.count)
            tasks.cancel_scope.cancel()
        assert flooded.statistics().dropped == 0
    # The rare message is received no later than the other messages of the same read.
    for number, read in enumerate(read_before, 1):
        assert read <= 999 * number + PACKETS_PER_READ + BUFFER


@pytest.mark.parametrize("overflow", ["raise", "drop_oldest", "drop_newest", "block"])
async def test_streams_can_be_read_alternately_in_a_flood(
    anyio_backend: object, overflow: Any
) -> None:
    pairs = b"".join(
        packets.publish(channel, b"%d" % number)
        for number in range(500)
        for channel in ("a/", "b/")
    )

    async def script(peer: Peer) -> None:
        await Flood(pairs, 2).run(peer)

    async with memory_peer(script, capacity=len(pairs)) as connectable:
        async with (
            connect_once(connectable=connectable) as emitter,
            emitter.subscribe("k", "a/", buffer=4, overflow=overflow) as one,
            emitter.subscribe("k", "b/", buffer=4, overflow=overflow) as other,
        ):
            for number in range(500):
                assert (await one.receive()).binary == b"%d" % number
                assert (await other.receive()).binary == b"%d" % number


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("size", "packet_id"), [(2, None), (20_000, None), (2, 7)], ids=["small", "large", "QoS 1"]
)
async def test_messages_of_one_read_are_offered_to_all_streams_before_waiting(
    anyio_backend: object, size: int, packet_id: int | None
) -> None:
    sent = [("a/", b"0"), ("a/", b"1"), ("b/", b"2")]
    chunk = b"".join(
        packets.publish(channel, number.rjust(size, b"."), packet_id) for channel, number in sent
    )

    async def script(peer: Peer) -> None:
        await peer.accept()
        for _ in range(2):
            await peer.answer(await peer.until(SUBSCRIBE))
        # Send a part and then the rest, so that the client decodes all messages together.
        await peer.send(chunk[:5])
        await anyio.wait_all_tasks_blocked()
        await peer.send(chunk[5:])
        await peer.answer_all()

    async with memory_peer(script, capacity=len(chunk)) as connectable:
        async with (
            connect_once(connectable=connectable) as emitter,
            emitter.subscribe("k", "a/", buffer=1, overflow="block") as one,
            emitter.subscribe("k", "b/", buffer=1, overflow="block") as other,
        ):
            with anyio.fail_after(5):
                received = [await stream.receive() for stream in (other, one, one)]
    assert [message.binary[-1:] for message in received] == [b"2", b"0", b"1"]


@pytest.mark.virtual_time
async def test_single_message_is_offered_to_all_streams_before_waiting(
    anyio_backend: object,
) -> None:
    ready = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.answer(await peer.until(SUBSCRIBE))
        await ready.wait()
        for number in range(3):
            await peer.send(packets.publish("a/", b"%d" % number))
            await anyio.wait_all_tasks_blocked()
        await peer.answer_all()

    async with memory_peer(script) as connectable:
        async with (
            connect_once(connectable=connectable) as emitter,
            emitter.subscribe("k", "a/", buffer=1, overflow="block") as small,
            emitter.stream("message") as large,
        ):
            with anyio.fail_after(5):
                ready.set()
                # The small stream is full when the second message arrives, so the third waits.
                streams = (large, large, small, small, large, small)
                received = [await stream.receive() for stream in streams]
    assert [int(message.binary) for message in received] == [0, 1, 0, 1, 2, 2]


@pytest.mark.virtual_time
async def test_presence_change_keeps_its_place_between_messages_of_one_read(
    anyio_backend: object,
) -> None:
    def presence_event(**fields: object) -> bytes:
        return packets.publish("emitter/presence/", json.dumps({"time": 1, **fields}).encode())

    change = presence_event(event="subscribe", channel="a/", who={"id": "x", "username": "y"})
    sent = [packets.publish("a/", b"%d" % number) for number in range(4)]

    async def script(peer: Peer) -> None:
        await peer.accept()
        request = await peer.until(PUBLISH)
        await peer.send(presence_event(req=request.packet_id, event="status", channel="a/", who=[]))
        await peer.answer(request)
        await peer.answer(await peer.until(SUBSCRIBE))
        await peer.send(b"".join((*sent[:3], change, *sent[3:])))
        await peer.answer_all()

    async with (
        memory_peer(script) as connectable,
        connect_once(connectable=connectable) as emitter,
        emitter.stream("presence") as changes,
    ):
        await emitter.presence("k", "a/", changes=True)
        assert (await changes.receive()).event == "status"
        async with emitter.subscribe("k", "a/", buffer=2, overflow="block") as messages:
            await anyio.wait_all_tasks_blocked()
            # The third message waits for buffer space, and so does the presence change after it.
            assert changes.statistics().current_buffer_used == 0
            received = [await messages.receive()]
            with anyio.fail_after(5):
                assert (await changes.receive()).event == "subscribe"
                received += [await messages.receive() for _ in range(3)]
    assert [int(message.binary) for message in received] == [0, 1, 2, 3]


async def test_flood_on_one_connection_does_not_delay_another(
    anyio_backend: object, broker: Broker
) -> None:
    reader = CountingReader()
    async with connect_to_flood("tcp", Flood()) as emitter, connect_once(broker.url) as other:
        async with emitter.subscribe("k", "a/") as messages, anyio.create_task_group() as tasks:
            tasks.start_soon(reader.run, messages)
            max_per_turn = 0
            for _ in range(50):
                before = reader.count
                await other.me()
                max_per_turn = max(max_per_turn, reader.count - before)
            tasks.cancel_scope.cancel()
    assert reader.count
    # A request and its reply take several turns of the loop, also in the broker.
    assert max_per_turn <= 40 * MAX_PER_TURN


# Hot loops


def make_calls(emitter: Emitter, broker: Broker) -> dict[str, Callable[[], Awaitable[object]]]:
    key = broker.keygen("a/#/", "rwslp")

    async def history() -> None:
        async for _ in emitter.history(key, "a/"):
            pass

    async def enter_and_leave() -> None:
        async with emitter.subscribe(key, "a/b/"):
            pass

    async def watch() -> None:
        async with emitter.watch_presence(key, "a/") as feed:
            await feed.receive()

    return {
        "publish": partial(emitter.publish, key, "a/", b"x"),
        "publish, qos=1": partial(emitter.publish, key, "a/", b"x", qos=1),
        "publish_with_link": partial(emitter.publish_with_link, "li", b"x"),
        "publish_with_link, qos=1": partial(emitter.publish_with_link, "li", b"x", qos=1),
        "subscribe": lambda: emitter.subscribe(key, "a/"),
        "unsubscribe": partial(emitter.unsubscribe, key, "a/c/"),
        "subscribe, entered": enter_and_leave,
        "keygen": partial(emitter.keygen, broker.secret_key, "b/"),
        "keyban": partial(emitter.keyban, broker.secret_key, broker.keygen("z/"), False),
        "link": partial(emitter.link, key, "a/", "li"),
        "me": emitter.me,
        "presence": partial(emitter.presence, key, "a/"),
        "watch_presence": watch,
        "history": history,
        "flush": emitter.flush,
        "wait_connected": emitter.wait_connected,
    }


METHODS: Final = (
    "publish",
    "publish, qos=1",
    "publish_with_link",
    "publish_with_link, qos=1",
    "subscribe",
    "unsubscribe",
    "subscribe, entered",
    "keygen",
    "keyban",
    "link",
    "me",
    "presence",
    "watch_presence",
    "history",
    "flush",
    "wait_connected",
)


@pytest.mark.parametrize("method", METHODS)
async def test_hot_loop_of_calls_yields_and_can_be_cancelled(broker: Broker, method: str) -> None:
    async with connect_once(broker.url) as emitter:
        await emitter.link(broker.keygen("a/#/", "rwslp"), "a/", "li")
        call = make_calls(emitter, broker)[method]
        await call()
        count = 0
        async with anyio.create_task_group() as tasks:

            async def cancel() -> None:
                tasks.cancel_scope.cancel()

            tasks.start_soon(cancel)
            while count < 1000:
                await call()
                count += 1
        assert count <= 2 * MAX_PER_TURN + 1


async def test_hot_loop_of_receive_can_be_cancelled(anyio_backend: object) -> None:
    reader = CountingReader()
    async with (
        connect_to_flood("tcp", Flood()) as emitter,
        emitter.subscribe("k", "a/") as messages,
    ):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reader.run, messages)
            while reader.count < 5000:
                await checkpoint()
            count = reader.count
            tasks.cancel_scope.cancel()
        assert reader.count - count <= MAX_PER_TURN


async def test_handler_in_a_flood_ends_when_client_is_cancelled(
    anyio_backend: object,
) -> None:
    count = cancelled = 0

    def handle(message: EmitterMessage) -> None:
        nonlocal count, cancelled
        count += 1
        if count == 5000:
            scope.cancel()
            cancelled = count

    async with serving("tcp", Flood().run) as options:
        with anyio.CancelScope() as scope:
            emitter: Any = connect_once(**options)
            emitter.on("message", handle)
            async with emitter:
                await emitter.subscribe("k", "a/")
                await anyio.sleep_forever()
    assert cancelled
    assert count - cancelled <= MAX_PER_TURN
