"""Nobody starves: a flood and a hot loop leave the others their turns, counted and not timed."""

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
from tests.support.links import one_link
from tests.support.memory import MemoryStream
from tests.support.peer import PUBLISH, SUBSCRIBE, Peer, memory_peer, serving

TURN: Final = 64
"""So many messages or calls may come between two turns of the others, who on Trio may come behind
us once more, as the tasks of a turn run in any order."""

PACKET: Final = packets.publish("a/", b"x")
LARGER: Final = packets.publish("a/", bytes(200))
CHUNK: Final = 65536 // len(PACKET)
"""What the client reads at a time is delivered in one go, as far as there is room for it."""

BUFFER: Final = 1024

# A flood from a link


class Flood:
    """A peer that sends without end, once the client has subscribed."""

    def __init__(self, packets: bytes = PACKET * 20_000, subscriptions: int = 1) -> None:
        self._packets = packets
        self._subscriptions = subscriptions

    async def play(self, peer: Peer) -> None:
        await peer.accept()
        for _ in range(self._subscriptions):
            await peer.answer(await peer.until(SUBSCRIBE))
        while True:
            await peer.send(self._packets)
            await checkpoint()  # a stream in memory need not have waited


@asynccontextmanager
async def flooded(link: str, flood: Flood) -> AsyncGenerator[Emitter]:
    async with serving(link, flood.play) as options, one_link(**options) as emitter:
        yield emitter


class Reading:
    """A task that reads a stream without end, and counts."""

    def __init__(self) -> None:
        self.count = 0

    async def run(self, messages: EventStream[EmitterMessage]) -> None:
        async for _ in messages:
            self.count += 1


def came(messages: EventStream[EmitterMessage]) -> int:
    """Tell how many messages have come into a stream."""
    figures = messages.statistics()
    return figures.received + figures.current_buffer_used


@pytest.mark.parametrize("link", ["tcp", "memory"])
async def test_a_flood_leaves_their_turns_to_others(anyio_backend: object, link: str) -> None:
    reading = Reading()
    async with flooded(link, Flood()) as emitter:
        async with emitter.subscribe("k", "a/") as messages, anyio.create_task_group() as tasks:
            tasks.start_soon(reading.run, messages)
            most_read = most_delivered = 0
            while reading.count < 20_000:
                read, delivered = reading.count, came(messages)
                await checkpoint()
                most_read = max(most_read, reading.count - read)
                most_delivered = max(most_delivered, came(messages) - delivered)
            tasks.cancel_scope.cancel()
    assert most_read <= 2 * TURN + 1
    assert most_delivered <= 2 * BUFFER


async def test_a_flood_that_nobody_takes_leaves_their_turns_to_others(
    anyio_backend: object,
) -> None:
    async with flooded("tcp", Flood()) as emitter:
        await emitter.subscribe("k", "a/")
        most = 0
        while (received := emitter.statistics().received) < 50_000:
            await checkpoint()
            most = max(most, emitter.statistics().received - received)
    assert most <= 2 * 4096


OTHERS: Final = 256
"""So many packets of other kinds, or frames of a WebSocket, come in one turn at most."""

SMALL: Final = {
    "unsuback": packets.unsuback(7),
    "suback": packets.suback(7, 0),
    "puback": packets.puback(7),
    "pingresp": packets.PINGRESP,
    "message of QoS 1": packets.publish("b/", b"", 7),
    "message of the broker's": packets.publish("emitter/x/", b"{}"),
    "topic that is no UTF-8": packets.publish(b"\xff", b""),
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.fast_path] * (kind == "puback")) for kind in SMALL],
)
async def test_many_small_packets_in_one_read_leave_their_turns_to_others(
    anyio_backend: object, kind: str
) -> None:
    count = 32 * 1024 // len(SMALL[kind])

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.answer(await peer.until(SUBSCRIBE))
        await peer.send(SMALL[kind] * count)
        await peer.answer_all()

    def done() -> int:
        figures = emitter.statistics()
        return figures.nonsense + figures.received

    async with serving("tcp", script) as options, one_link(**options) as emitter:
        await emitter.subscribe("k", "a/")
        most, before = 0, done()
        while before < count:
            await checkpoint()
            most, before = max(most, done() - before), done()
    assert most <= 2 * OTHERS + 1


@pytest.mark.parametrize("frame", [b"\x89\0", b"\x82\0"], ids=["ping", "empty"])
async def test_many_small_frames_in_one_read_leave_their_turns_to_others(
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

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    async with serving("ws", script) as options, one_link(**options) as emitter:
        await emitter.subscribe("k", "a/")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take_turns)
            # Its answer comes behind the frames.
            await emitter.flush(timeout=None)
            tasks.cancel_scope.cancel()
    assert turns >= count // (2 * OTHERS)


async def test_what_comes_behind_the_connack_leaves_their_turns_to_others_too(
    anyio_backend: object,
) -> None:
    count = 1000

    async def script(peer: Peer) -> None:
        await peer.packet()
        await peer.send(packets.CONNACK + packets.unsuback(7) * count)
        await peer.answer_all()

    async with serving("tcp", script) as options, one_link(**options) as emitter:
        most, before = 0, emitter.statistics().nonsense
        while before < count:
            await checkpoint()
            nonsense = emitter.statistics().nonsense
            most, before = max(most, nonsense - before), nonsense
    assert most <= 2 * OTHERS + 1


@pytest.mark.parametrize("packet", [PACKET, LARGER])
async def test_in_a_flood_more_is_read_at_a_time(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch, packet: bytes
) -> None:
    sizes = [0]
    receive = MemoryStream.receive

    async def watched(stream: MemoryStream, max_bytes: int = 65536) -> bytes:
        sizes.append(max_bytes)
        return await receive(stream, max_bytes)

    flood = Flood(packet * (1_000_000 // len(packet)))
    async with memory_peer(flood.play, capacity=1_000_000) as connectable:
        async with one_link(connectable=connectable) as emitter:
            monkeypatch.setattr(MemoryStream, "receive", watched)
            await emitter.subscribe("k", "a/")
            while len(sizes) < 10:
                await checkpoint()
    assert max(sizes) == 262144


async def test_a_deadline_passes_although_a_flood_goes_on(anyio_backend: object) -> None:
    # Before a deadline is judged, the reader takes in what has arrived, which never ends here.
    reading = Reading()
    async with flooded("tcp", Flood()) as emitter:
        async with emitter.subscribe("k", "a/") as messages, anyio.create_task_group() as tasks:
            tasks.start_soon(reading.run, messages)
            while reading.count < 5000:
                await checkpoint()
            with pytest.raises(RequestTimeoutError):
                await emitter.publish("k", "a/", "x", qos=1, timeout=0)
            fallen = reading.count
            while reading.count == fallen:
                await checkpoint()
            tasks.cancel_scope.cancel()


async def test_a_flood_on_one_subscription_does_not_hold_up_another(anyio_backend: object) -> None:
    rare = packets.publish("b/", b"x")
    flooding, read_before = Reading(), list[int]()
    async with flooded("tcp", Flood(PACKET * 999 + rare, 2)) as emitter:
        async with (
            emitter.subscribe("k", "a/") as many,
            emitter.subscribe("k", "b/") as few,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(flooding.run, many)
            for _ in range(20):
                await few.receive()
                read_before.append(flooding.count)
            tasks.cancel_scope.cancel()
        assert many.statistics().dropped == 0
    # Never later than those who read what came before and behind it in the same chunk.
    for number, read in enumerate(read_before, 1):
        assert read <= 999 * number + CHUNK + BUFFER


@pytest.mark.parametrize("overflow", ["raise", "drop_oldest", "drop_newest", "block"])
async def test_in_a_flood_several_streams_may_be_read_by_turns(
    anyio_backend: object, overflow: Any
) -> None:
    pairs = b"".join(
        packets.publish(channel, b"%d" % number)
        for number in range(500)
        for channel in ("a/", "b/")
    )

    async def script(peer: Peer) -> None:
        await Flood(pairs, 2).play(peer)

    async with memory_peer(script, capacity=len(pairs)) as connectable:
        async with (
            one_link(connectable=connectable) as emitter,
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
async def test_what_comes_in_one_go_is_offered_to_all_before_one_is_waited_for(
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
        # A part of it and then the rest, so that it is taken in together.
        await peer.send(chunk[:5])
        await anyio.wait_all_tasks_blocked()
        await peer.send(chunk[5:])
        await peer.answer_all()

    async with memory_peer(script, capacity=len(chunk)) as connectable:
        async with (
            one_link(connectable=connectable) as emitter,
            emitter.subscribe("k", "a/", buffer=1, overflow="block") as one,
            emitter.subscribe("k", "b/", buffer=1, overflow="block") as other,
        ):
            with anyio.fail_after(5):
                got = [await stream.receive() for stream in (other, one, one)]
    assert [message.binary[-1:] for message in got] == [b"2", b"0", b"1"]


@pytest.mark.virtual_time
async def test_what_comes_alone_is_offered_to_all_before_one_is_waited_for(
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
            one_link(connectable=connectable) as emitter,
            emitter.subscribe("k", "a/", buffer=1, overflow="block") as few,
            emitter.stream("message") as many,
        ):
            with anyio.fail_after(5):
                ready.set()
                # The first one is full by the second message, which holds up the third.
                got = [await stream.receive() for stream in (many, many, few, few, many, few)]
    assert [int(message.binary) for message in got] == [0, 1, 0, 1, 2, 2]


@pytest.mark.virtual_time
async def test_what_the_broker_says_between_messages_of_one_go_keeps_its_place(
    anyio_backend: object,
) -> None:
    def said(**fields: object) -> bytes:
        return packets.publish("emitter/presence/", json.dumps({"time": 1, **fields}).encode())

    change = said(event="subscribe", channel="a/", who={"id": "x", "username": "y"})
    sent = [packets.publish("a/", b"%d" % number) for number in range(4)]

    async def script(peer: Peer) -> None:
        await peer.accept()
        asked = await peer.until(PUBLISH)
        await peer.send(said(req=asked.packet_id, event="status", channel="a/", who=[]))
        await peer.answer(asked)
        await peer.answer(await peer.until(SUBSCRIBE))
        await peer.send(b"".join((*sent[:3], change, *sent[3:])))
        await peer.answer_all()

    async with (
        memory_peer(script) as connectable,
        one_link(connectable=connectable) as emitter,
        emitter.stream("presence") as changes,
    ):
        await emitter.presence("k", "a/", changes=True)
        assert (await changes.receive()).event == "status"
        async with emitter.subscribe("k", "a/", buffer=2, overflow="block") as messages:
            await anyio.wait_all_tasks_blocked()
            # The third message waits for room, and what is behind it with it.
            assert changes.statistics().current_buffer_used == 0
            got = [await messages.receive()]
            with anyio.fail_after(5):
                assert (await changes.receive()).event == "subscribe"
                got += [await messages.receive() for _ in range(3)]
    assert [int(message.binary) for message in got] == [0, 1, 2, 3]


async def test_a_flood_on_one_link_does_not_hold_up_another(
    anyio_backend: object, broker: Broker
) -> None:
    reading = Reading()
    async with flooded("tcp", Flood()) as emitter, one_link(broker.url) as other:
        async with emitter.subscribe("k", "a/") as messages, anyio.create_task_group() as tasks:
            tasks.start_soon(reading.run, messages)
            most = 0
            for _ in range(50):
                before = reading.count
                await other.me()
                most = max(most, reading.count - before)
            tasks.cancel_scope.cancel()
    assert reading.count
    # Question and answer take some turns of the loop, in the broker too.
    assert most <= 40 * TURN


# Hot loops


def calls(emitter: Emitter, broker: Broker) -> dict[str, Callable[[], Awaitable[object]]]:
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


VERBS: Final = (
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


@pytest.mark.parametrize("verb", VERBS)
async def test_a_hot_loop_leaves_their_turns_to_others_and_ends_when_cancelled(
    broker: Broker, verb: str
) -> None:
    async with one_link(broker.url) as emitter:
        await emitter.link(broker.keygen("a/#/", "rwslp"), "a/", "li")
        call = calls(emitter, broker)[verb]
        await call()
        count = 0
        async with anyio.create_task_group() as tasks:

            async def cancel() -> None:
                tasks.cancel_scope.cancel()

            tasks.start_soon(cancel)
            while count < 1000:
                await call()
                count += 1
        assert count <= 2 * TURN + 1


async def test_a_hot_loop_that_receives_ends_when_cancelled(anyio_backend: object) -> None:
    reading = Reading()
    async with flooded("tcp", Flood()) as emitter, emitter.subscribe("k", "a/") as messages:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reading.run, messages)
            while reading.count < 5000:
                await checkpoint()
            count = reading.count
            tasks.cancel_scope.cancel()
        assert reading.count - count <= TURN


async def test_a_handler_under_a_flood_ends_when_the_client_is_cancelled(
    anyio_backend: object,
) -> None:
    count = cancelled = 0

    def take(message: EmitterMessage) -> None:
        nonlocal count, cancelled
        count += 1
        if count == 5000:
            scope.cancel()
            cancelled = count

    async with serving("tcp", Flood().play) as options:
        with anyio.CancelScope() as scope:
            emitter: Any = one_link(**options)
            emitter.on("message", take)
            async with emitter:
                await emitter.subscribe("k", "a/")
                await anyio.sleep_forever()
    assert cancelled
    assert count - cancelled <= TURN
