"""What leaves: in order, whole, and without holding up a caller."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import ConnectionLostError, Emitter
from emitter_anyio._net.transport import SocketTransport, StreamTransport, Transport
from emitter_anyio._net.writer import (
    BUSY_PACKETS,
    LARGE_PACKET_BYTES,
    MAX_COLLECT_YIELDS,
    MAX_QUEUED_BYTES,
    MAX_SEND_BYTES,
    Writer,
)
from tests.support.connections import connect_once
from tests.support.memory import MemoryStream, memory_stream_pair
from tests.support.peer import DISCONNECT, PUBLISH, TRANSPORTS, Packet, Peer, memory_peer, serving
from tests.support.steps import cancel_styles

FULL = bytes(MAX_QUEUED_BYTES)


class SocketLink:
    """A writer on a socket whose buffers are as small as the system makes them."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        for sock in (ours, self.peer):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        self.transport = SocketTransport(ours)
        self.writer = Writer(self.transport)

    async def read(self, size: int) -> bytes:
        """Read exactly so many bytes."""
        data = b""
        while len(data) < size:
            await anyio.wait_readable(self.peer)
            data += self.peer.recv(size - len(data))
        return data

    def waits(self) -> bytes:
        """What is there for the peer now."""
        with suppress(BlockingIOError):
            return self.peer.recv(1 << 20)
        return b""


@asynccontextmanager
async def socket_link() -> AsyncGenerator[SocketLink]:
    link = SocketLink()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(link.writer.run)
            await anyio.wait_all_tasks_blocked()
            yield link
            tasks.cancel_scope.cancel()
    finally:
        await link.transport.aclose()
        link.peer.close()


@asynccontextmanager
async def memory_writer(capacity: int) -> AsyncGenerator[tuple[Writer, MemoryStream]]:
    ours, peer = memory_stream_pair(capacity)
    writer = Writer(StreamTransport(ours))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(writer.run)
        await anyio.wait_all_tasks_blocked()
        yield writer, peer
        tasks.cancel_scope.cancel()


# Order and size


async def test_the_first_packet_of_a_turn_leaves_at_once(anyio_backend: object) -> None:
    async with socket_link() as link:
        link.writer.write(b"first")
        assert link.waits() == b"first"
        link.writer.write(b"second")
        link.writer.write(b"third")
        assert link.waits() == b""
        assert link.writer.size == 11
        assert await link.read(11) == b"secondthird"
        assert link.writer.size == 0
        assert link.writer.sent == link.writer.queued == 16


async def test_a_large_packet_waits_for_no_others(anyio_backend: object) -> None:
    large = b"x" * LARGE_PACKET_BYTES
    async with socket_link() as link:
        link.writer.write(b"first")
        assert link.waits() == b"first"
        link.writer.write(large)
        begun = link.waits()
        assert begun
        link.writer.write(b"last")
        assert begun + await link.read(LARGE_PACKET_BYTES + 4 - len(begun)) == large + b"last"


async def test_packets_of_every_size_leave_in_order(anyio_backend: object) -> None:
    chance = random.Random(1)
    sent = [chance.randbytes(chance.choice((1, 50, 5000, 70_000))) for _ in range(200)]
    async with socket_link() as link:

        async def write() -> None:
            for packet in sent:
                await link.writer.wait_for_space()
                link.writer.write(packet)
                if chance.random() < 0.3:
                    await checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            assert await link.read(sum(map(len, sent))) == b"".join(sent)


async def test_a_packet_larger_than_the_socket_leaves_in_pieces(anyio_backend: object) -> None:
    packet = random.Random(2).randbytes(1_000_000)
    async with socket_link() as link:
        link.writer.write(packet)
        assert 0 < link.writer.sent < len(packet)
        link.writer.write(b"behind")
        assert await link.read(len(packet) + 6) == packet + b"behind"


async def test_a_stream_gets_what_gathers_meanwhile_in_one_piece(anyio_backend: object) -> None:
    async with memory_writer(1 << 20) as (writer, peer):
        for number in range(10):
            writer.write(b"%d" % number)
        assert writer.size == 10
        assert await peer.receive() == b"0123456789"


async def test_no_more_than_a_chunk_is_gathered(anyio_backend: object) -> None:
    async with memory_writer(200_000) as (writer, _):
        for _ in range(5):
            writer.write(bytes(60_000))
        await anyio.wait_all_tasks_blocked()
        assert writer.size == 120_000


async def turns_until_it_leaves(link: SocketLink, packets: int, size: int) -> int:
    """Write so many packets in each turn, until more than the first has left."""
    left = 0
    for turn in range(100):
        for _ in range(packets):
            link.writer.write(bytes(size))
        await checkpoint()
        left += len(link.waits())
        if left > size:
            return turn
    raise AssertionError("nothing has left")


async def test_where_many_come_in_each_turn_they_gather_for_a_while(anyio_backend: object) -> None:
    async with socket_link() as link:
        assert (
            MAX_COLLECT_YIELDS
            < await turns_until_it_leaves(link, 2 * BUSY_PACKETS, 1)
            <= 2 * MAX_COLLECT_YIELDS + 1
        )
        await anyio.wait_all_tasks_blocked()
        assert link.writer.size == 0


@pytest.mark.parametrize(
    ("packets", "size"), [(5, 1), (2 * BUSY_PACKETS, MAX_SEND_BYTES // BUSY_PACKETS)]
)
async def test_where_few_come_or_enough_have_come_nothing_is_put_off(
    packets: int, size: int, anyio_backend: object
) -> None:
    async with socket_link() as link:
        assert await turns_until_it_leaves(link, packets, size) < 4


async def test_writing_never_waits(anyio_backend: object) -> None:
    async with socket_link() as link:
        for number in range(100):
            link.writer.write(FULL)
            assert link.writer.queued == (number + 1) * len(FULL)
        assert link.writer.size > 99 * len(FULL)
        # A packet that leaves nothing over keeps its place in the count.
        assert link.writer.size + link.writer.sent == link.writer.queued


@pytest.mark.virtual_time
async def test_the_time_of_the_last_bytes_is_known(anyio_backend: object) -> None:
    async with memory_writer(10) as (writer, peer):
        start = writer.last_sent
        await anyio.sleep(5)
        assert writer.last_sent == start
        writer.write(bytes(15))
        await anyio.sleep(1)
        assert writer.last_sent == start
        await peer.receive()
        await anyio.sleep(1)
        assert writer.last_sent == pytest.approx(start + 6)


# Room


async def wait_for_room(link: SocketLink, number: int, packet: bytes, admitted: list[int]) -> None:
    await link.writer.wait_for_space()
    admitted.append(number)
    link.writer.write(packet)


async def test_there_is_room_until_enough_waits(anyio_backend: object) -> None:
    async with socket_link() as link:
        await link.writer.wait_for_space()
        link.writer.write(FULL * 2)
        assert not link.writer.has_space
        admitted: list[int] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_for_room, link, 1, b"x", admitted)
            await anyio.wait_all_tasks_blocked()
            assert not admitted
            assert await link.read(2 * len(FULL) + 1) == FULL * 2 + b"x"
        assert admitted == [1]
        assert link.writer.has_space


async def test_who_comes_first_is_served_first(anyio_backend: object) -> None:
    async with socket_link() as link:
        link.writer.write(FULL * 2)
        admitted: list[int] = []
        most = 0
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(wait_for_room, link, number, b"%02d" % number + FULL, admitted)
                await anyio.wait_all_tasks_blocked()
            await link.read(2 * len(FULL))
            for number in range(20):
                assert (await link.read(2 + len(FULL)))[:2] == b"%02d" % number
                most = max(most, link.writer.size)
        assert admitted == list(range(20))
        # One that is let in lets in the next, before either has written.
        assert most < 3 * len(FULL)


@pytest.mark.parametrize("attempt", range(5))
async def test_nobody_overtakes_one_who_waits(anyio_backend: object, attempt: int) -> None:
    async with socket_link() as link:
        link.writer.write(FULL + b"x")
        admitted: list[int] = []

        async def come_when_there_is_room() -> None:
            # Wakes up in the turn in which the first one is let in.
            await link.writer.wait_sent()
            assert link.writer.size < MAX_QUEUED_BYTES
            await wait_for_room(link, 2, b"2", admitted)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(come_when_there_is_room)
            await anyio.wait_all_tasks_blocked()
            link.writer.write(FULL[1:])
            tasks.start_soon(wait_for_room, link, 1, b"1", admitted)
            await anyio.wait_all_tasks_blocked()
            assert (await link.read(2 * len(FULL) + 2))[-2:] == b"12"
        assert admitted == [1, 2]


class Waiting:
    """A task that waits for room, and can be cancelled in both ways."""

    def __init__(self, link: SocketLink, number: int, admitted: list[int]) -> None:
        self._scope = anyio.CancelScope()
        self._task: asyncio.Task[Any] | None = None
        self._wait = partial(wait_for_room, link, number, b"x", admitted)

    async def run(self, style: str) -> None:
        if style == "native":
            self._task = asyncio.current_task()
        with self._scope, suppress(asyncio.CancelledError):
            await self._wait()

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        else:
            self._scope.cancel()


async def test_who_gives_up_lets_the_next_one_in(anyio_backend: object) -> None:
    for style in cancel_styles():
        async with socket_link() as link:
            link.writer.write(FULL * 2)
            admitted: list[int] = []
            waiting = [Waiting(link, number, admitted) for number in range(5)]
            async with anyio.create_task_group() as tasks:
                for one in waiting:
                    tasks.start_soon(one.run, style)
                    await anyio.wait_all_tasks_blocked()
                waiting[0].cancel()
                waiting[2].cancel()
                await link.read(2 * len(FULL) + 3)
            assert admitted == [1, 3, 4]
            assert link.writer.queued == 2 * len(FULL) + 3


async def test_who_gives_up_when_its_turn_has_come_lets_the_next_one_in(
    anyio_backend: object,
) -> None:
    for style in cancel_styles():
        async with socket_link() as link:
            link.writer.write(FULL + b"x")
            admitted: list[int] = []
            waiting = [Waiting(link, number, admitted) for number in range(3)]

            async def cancel_the_first(one: Waiting, link: SocketLink = link) -> None:
                await link.writer.wait_sent()
                one.cancel()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancel_the_first, waiting[0])
                await anyio.wait_all_tasks_blocked()
                link.writer.write(FULL[1:])
                for one in waiting:
                    tasks.start_soon(one.run, style)
                    await anyio.wait_all_tasks_blocked()
                await link.read(2 * len(FULL) + 2)
            assert admitted[-2:] == [1, 2]
            assert link.writer.queued == 2 * len(FULL) + len(admitted)


# Marks


async def test_left_returns_when_these_bytes_have_left(anyio_backend: object) -> None:
    left = []

    async def wait(link: SocketLink, mark: int) -> None:
        await link.writer.wait_sent()
        assert link.writer.sent >= mark
        left.append(mark)

    async with socket_link() as link:
        marks = []
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                link.writer.write(FULL)
                marks.append(link.writer.queued)
                tasks.start_soon(wait, link, link.writer.queued)
                await anyio.wait_all_tasks_blocked()
            assert not left
            for mark in marks:
                while link.writer.sent < mark:
                    link.waits()
                    await checkpoint()
                await anyio.wait_all_tasks_blocked()
                assert mark in left
                assert marks[-1] not in left or mark == marks[-1]
        assert left == marks
        await link.writer.wait_sent()


async def test_giving_up_on_a_mark_leaves_the_others_alone(anyio_backend: object) -> None:
    async with memory_writer(10) as (writer, peer):
        writer.write(bytes(30))
        left = []

        async def wait() -> None:
            await writer.wait_sent()
            left.append(True)

        async with anyio.create_task_group() as tasks:
            with anyio.move_on_after(0):
                await writer.wait_sent()
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            assert not left
            received = b""
            while len(received) < 30:
                received += await peer.receive()
        assert left


# The end


async def test_a_link_that_is_gone_lets_everybody_go(anyio_backend: object) -> None:
    async with socket_link() as link:
        link.writer.write(FULL * 3)
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(link.writer.wait_for_space)
                tasks.start_soon(link.writer.wait_sent)
            await anyio.wait_all_tasks_blocked()
            link.writer.stop()
        # And those who come now as well.
        assert not link.writer.has_space
        await link.writer.wait_for_space()
        await link.writer.wait_sent()


async def test_only_the_task_meets_the_error_of_a_broken_link(anyio_backend: object) -> None:
    link = SocketLink()
    link.peer.close()
    met = []

    async def run() -> None:
        with pytest.raises(BrokenPipeError):
            await link.writer.run()
        met.append(True)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await anyio.wait_all_tasks_blocked()
        link.writer.write(b"x")
        link.writer.write(b"y")
        link.writer.send_nowait()
        assert link.writer.size == 2
        assert not met
    assert met
    await link.transport.aclose()


async def test_hurrying_sends_what_the_link_takes(anyio_backend: object) -> None:
    async with socket_link() as link:
        link.writer.write(b"a")
        link.writer.write(b"b")
        link.writer.send_nowait()
        assert link.waits() == b"ab"
        assert link.writer.size == 0


async def test_hurrying_leaves_alone_what_is_under_way(anyio_backend: object) -> None:
    data = random.Random(4).randbytes(500_000)
    async with socket_link() as link:
        link.writer.write(data)
        await anyio.wait_all_tasks_blocked()
        received = link.waits()
        # The link would take more, but the task already has it in hand.
        sent = link.writer.sent
        link.writer.send_nowait()
        assert link.writer.sent == sent
        received += await link.read(len(data) - len(received))
        assert received == data


async def test_nothing_has_room_behind_the_last_packet(anyio_backend: object) -> None:
    async with socket_link() as link:
        assert link.writer.has_space
        link.writer.write_last(b"x")
        assert not link.writer.has_space
        # There is nothing to wait for: who comes now finds that the client is leaving.
        await link.writer.wait_for_space()


# Which packets the link has had nothing of


class Taking(Transport):
    """
    A link that takes so many bytes at a time, and nothing when it has had them all.

    :param sizes: how many
    :param may_send_part: whether it hands over a part where it fails
    """

    def __init__(self, *sizes: int, may_send_part: bool = False) -> None:
        self.sizes = list(sizes)
        self.may_send_part = may_send_part

    async def receive(self, size: int = 65536) -> bytes:
        raise NotImplementedError

    def try_send(self, data: bytes | memoryview) -> int:
        return 0 if self.may_send_part or not self.sizes else min(self.sizes.pop(0), len(data))

    async def send(self, data: bytes | memoryview) -> int:
        if self.may_send_part and self.sizes:
            await checkpoint()
            self.sizes.pop(0)
            return len(data)
        await anyio.sleep_forever()
        raise AssertionError("it slept for ever")

    async def send_eof(self) -> None:
        raise NotImplementedError

    def interrupt(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError


async def untouched(transport: Transport, *packets: bytes) -> list[bytes]:
    """Write packets, let the link take what it takes, and tell what it had nothing of."""
    writer = Writer(transport)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(writer.run)
        await anyio.wait_all_tasks_blocked()
        for packet in packets:
            writer.write(packet)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    return list(map(bytes, writer.unsent_packets))


@pytest.mark.parametrize(
    ("sizes", "left"),
    [
        ((), [b"aaa", b"bb", b"c"]),
        ((3,), [b"bb", b"c"]),
        ((2,), [b"bb", b"c"]),
        ((3, 1), [b"c"]),
        ((3, 2), [b"c"]),
        ((2, 1, 2), [b"c"]),
        ((2, 2), [b"c"]),
        ((3, 3), []),
        ((1, 1, 1, 1, 1), [b"c"]),
    ],
)
async def test_a_packet_is_touched_by_its_first_byte(
    anyio_backend: object, sizes: tuple[int, ...], left: list[bytes]
) -> None:
    assert await untouched(Taking(*sizes), b"aaa", b"bb", b"c") == left


async def test_all_of_what_a_stream_has_in_hand_is_touched(anyio_backend: object) -> None:
    # What was gathered for one send may have gone in part.
    assert await untouched(Taking(may_send_part=True), b"aaa", b"bb") == []
    large = bytes(MAX_SEND_BYTES)
    assert await untouched(Taking(may_send_part=True), b"a", large, b"bb", b"c") == [b"bb", b"c"]
    assert await untouched(Taking(1, may_send_part=True), large, b"bb", b"c") == []


async def test_before_the_writer_runs_nothing_is_touched(anyio_backend: object) -> None:
    writer = Writer(Taking(may_send_part=True))
    writer.write(b"aaa")
    assert writer.unsent_packets == [b"aaa"]


# A client's publishes


async def publish_numbered(
    emitter: Emitter, number: int, size: int, returned: list[int], qos: Any = 0
) -> None:
    await emitter.publish("k", "a/", b"%06d" % number + bytes(size), qos=qos)
    returned.append(number)


async def cancelled_publishers(emitter: Emitter, style: str, seed: int) -> tuple[set[int], int]:
    """Publish from many tasks, and cancel half of them at some time; give whose call returned."""
    chance = random.Random(seed)
    returned: list[int] = []
    native: list[asyncio.Task[None]] = []

    async def publish_and_cancel(number: int) -> None:
        size = chance.choice((0, 100, 10_000, 60_000))
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as pair:
                if chance.random() < 0.5:
                    pair.start_soon(cancel_later, scope.cancel)
                await publish_numbered(emitter, number, size, returned)

    async def cancel_later(cancel: Callable[[], object]) -> None:
        for _ in range(chance.randrange(30)):
            await checkpoint()
        cancel()

    async with anyio.create_task_group() as tasks:
        for number in range(200):
            if style == "scope":
                tasks.start_soon(publish_and_cancel, number)
                continue
            size = chance.choice((0, 100, 10_000, 60_000))
            task = asyncio.ensure_future(publish_numbered(emitter, number, size, returned))
            native.append(task)
            if chance.random() < 0.5:
                tasks.start_soon(cancel_later, task.cancel)
        if native:
            await asyncio.wait(native)
    return set(returned), len(returned)


@pytest.mark.parametrize("link", TRANSPORTS)
async def test_cancelled_publishes_leave_whole_or_not_at_all(
    anyio_backend: object, link: str
) -> None:
    published: list[Packet] = []

    async def script(peer: Peer) -> None:
        # Behind the client most of the time, so that most of the publishers wait for room.
        await peer.accept()
        while packet := await peer.packet():
            for _ in range(3):
                await checkpoint()
            if packet.kind == DISCONNECT:
                break
            published.append(packet)
        assert not peer.unparsed

    async with serving(link, script) as options:
        for style in cancel_styles():
            async with connect_once(**options) as emitter:
                returned, count = await cancelled_publishers(emitter, style, seed=3)
            numbers = [int(packet.payload[:6]) for packet in published]
            assert len(numbers) == len(set(numbers)) == count
            assert set(numbers) == returned
            assert count < 200
            published.clear()


async def test_a_verb_does_not_wait_for_a_link_that_takes_nothing(anyio_backend: object) -> None:
    goes_on = anyio.Event()
    payloads: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        await goes_on.wait()
        payloads.extend(packet.payload for packet in await peer.rest() if packet.kind == PUBLISH)

    async with memory_peer(script, capacity=100) as connectable:
        async with connect_once(connectable=connectable) as emitter:
            # Nothing but room is waited for, and the first of these fills the link.
            for number in range(30):
                await emitter.publish("k", "a/", b"%02d" % number + bytes(2000))
            assert emitter.statistics().queued_bytes > 50_000
            goes_on.set()
        assert [payload[:2] for payload in payloads] == [b"%02d" % number for number in range(30)]


async def test_those_who_wait_for_room_or_to_leave_learn_that_the_link_is_lost(
    anyio_backend: object,
) -> None:
    breaks = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await breaks.wait()

    lost = []

    async def lose(call: Callable[[], Any]) -> None:
        with pytest.raises(ConnectionLostError):
            await call()
        lost.append(call)

    async with memory_peer(script, capacity=100) as connectable:
        with pytest.raises(ConnectionLostError):
            async with connect_once(connectable=connectable) as emitter:
                with anyio.CancelScope(shield=True):
                    async with anyio.create_task_group() as tasks:
                        for qos in (1, 1, 1, 1, 1, 0, 0):
                            tasks.start_soon(
                                lose, partial(emitter.publish, "k", "a/", bytes(65000), qos=qos)
                            )
                            await anyio.wait_all_tasks_blocked()
                        tasks.start_soon(lose, emitter.me)
                        tasks.start_soon(lose, emitter.flush)
                        await anyio.wait_all_tasks_blocked()
                        breaks.set()
    assert len(lost) == 9
