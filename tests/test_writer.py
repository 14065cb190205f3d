"""The writer: packets leave in order and whole, and no caller waits for the connection."""

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


class SocketPair:
    """A writer on a socket with the smallest buffers that the system allows."""

    def __init__(self) -> None:
        own_end, self.peer = socket.socketpair()
        for sock in (own_end, self.peer):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        self.transport = SocketTransport(own_end)
        self.writer = Writer(self.transport)

    async def read(self, size: int) -> bytes:
        """Read exactly ``size`` bytes at the peer."""
        data = b""
        while len(data) < size:
            await anyio.wait_readable(self.peer)
            data += self.peer.recv(size - len(data))
        return data

    def read_available(self) -> bytes:
        """Read what has arrived at the peer, without waiting."""
        with suppress(BlockingIOError):
            return self.peer.recv(1 << 20)
        return b""


@asynccontextmanager
async def socket_pair() -> AsyncGenerator[SocketPair]:
    pair = SocketPair()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pair.writer.run)
            await anyio.wait_all_tasks_blocked()
            yield pair
            tasks.cancel_scope.cancel()
    finally:
        await pair.transport.aclose()
        pair.peer.close()


@asynccontextmanager
async def memory_writer(capacity: int) -> AsyncGenerator[tuple[Writer, MemoryStream]]:
    own_end, peer = memory_stream_pair(capacity)
    writer = Writer(StreamTransport(own_end))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(writer.run)
        await anyio.wait_all_tasks_blocked()
        yield writer, peer
        tasks.cancel_scope.cancel()


# Order and size


async def test_first_packet_of_a_turn_is_sent_immediately(anyio_backend: object) -> None:
    async with socket_pair() as pair:
        pair.writer.write(b"first")
        assert pair.read_available() == b"first"
        pair.writer.write(b"second")
        pair.writer.write(b"third")
        assert pair.read_available() == b""
        assert pair.writer.size == 11
        assert await pair.read(11) == b"secondthird"
        assert pair.writer.size == 0
        assert pair.writer.sent == pair.writer.queued == 16


async def test_large_packet_is_not_batched(anyio_backend: object) -> None:
    large = b"x" * LARGE_PACKET_BYTES
    async with socket_pair() as pair:
        pair.writer.write(b"first")
        assert pair.read_available() == b"first"
        pair.writer.write(large)
        started = pair.read_available()
        assert started
        pair.writer.write(b"last")
        assert started + await pair.read(LARGE_PACKET_BYTES + 4 - len(started)) == large + b"last"


async def test_packets_of_all_sizes_are_sent_in_order(anyio_backend: object) -> None:
    rng = random.Random(1)
    sent = [rng.randbytes(rng.choice((1, 50, 5000, 70_000))) for _ in range(200)]
    async with socket_pair() as pair:

        async def write() -> None:
            for packet in sent:
                await pair.writer.wait_for_space()
                pair.writer.write(packet)
                if rng.random() < 0.3:
                    await checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            assert await pair.read(sum(map(len, sent))) == b"".join(sent)


async def test_packet_larger_than_the_socket_buffer_is_sent_in_pieces(
    anyio_backend: object,
) -> None:
    packet = random.Random(2).randbytes(1_000_000)
    async with socket_pair() as pair:
        pair.writer.write(packet)
        assert 0 < pair.writer.sent < len(packet)
        pair.writer.write(b"after!")
        assert await pair.read(len(packet) + 6) == packet + b"after!"


async def test_packets_are_batched_into_one_send_on_a_stream(anyio_backend: object) -> None:
    async with memory_writer(1 << 20) as (writer, peer):
        for number in range(10):
            writer.write(b"%d" % number)
        assert writer.size == 10
        assert await peer.receive() == b"0123456789"


async def test_batch_is_limited_to_one_chunk(anyio_backend: object) -> None:
    async with memory_writer(200_000) as (writer, _):
        for _ in range(5):
            writer.write(bytes(60_000))
        await anyio.wait_all_tasks_blocked()
        assert writer.size == 120_000


async def turns_until_sent(pair: SocketPair, packets: int, size: int) -> int:
    """Write ``packets`` in each turn until more than the first was sent; return the turn."""
    left = 0
    for turn in range(100):
        for _ in range(packets):
            pair.writer.write(bytes(size))
        await checkpoint()
        left += len(pair.read_available())
        if left > size:
            return turn
    raise AssertionError("nothing was sent")


async def test_many_packets_per_turn_are_batched_for_a_few_turns(anyio_backend: object) -> None:
    async with socket_pair() as pair:
        assert (
            MAX_COLLECT_YIELDS
            < await turns_until_sent(pair, 2 * BUSY_PACKETS, 1)
            <= 2 * MAX_COLLECT_YIELDS + 1
        )
        await anyio.wait_all_tasks_blocked()
        assert pair.writer.size == 0


@pytest.mark.parametrize(
    ("packets", "size"), [(5, 1), (2 * BUSY_PACKETS, MAX_SEND_BYTES // BUSY_PACKETS)]
)
async def test_few_packets_per_turn_or_a_full_batch_are_not_delayed(
    packets: int, size: int, anyio_backend: object
) -> None:
    async with socket_pair() as pair:
        assert await turns_until_sent(pair, packets, size) < 4


async def test_write_never_waits(anyio_backend: object) -> None:
    async with socket_pair() as pair:
        for number in range(100):
            pair.writer.write(FULL)
            assert pair.writer.queued == (number + 1) * len(FULL)
        assert pair.writer.size > 99 * len(FULL)
        # A packet that was sent completely still counts as queued in the total.
        assert pair.writer.size + pair.writer.sent == pair.writer.queued


@pytest.mark.virtual_time
async def test_last_sent_is_the_time_of_the_last_send(anyio_backend: object) -> None:
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


# Queue space


async def write_when_there_is_space(
    pair: SocketPair, number: int, packet: bytes, admitted: list[int]
) -> None:
    await pair.writer.wait_for_space()
    admitted.append(number)
    pair.writer.write(packet)


async def test_writers_wait_while_the_queue_is_full(anyio_backend: object) -> None:
    async with socket_pair() as pair:
        await pair.writer.wait_for_space()
        pair.writer.write(FULL * 2)
        assert not pair.writer.has_space
        admitted: list[int] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write_when_there_is_space, pair, 1, b"x", admitted)
            await anyio.wait_all_tasks_blocked()
            assert not admitted
            assert await pair.read(2 * len(FULL) + 1) == FULL * 2 + b"x"
        assert admitted == [1]
        assert pair.writer.has_space


async def test_waiting_writers_continue_in_order(anyio_backend: object) -> None:
    async with socket_pair() as pair:
        pair.writer.write(FULL * 2)
        admitted: list[int] = []
        peak = 0
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(
                    write_when_there_is_space, pair, number, b"%02d" % number + FULL, admitted
                )
                await anyio.wait_all_tasks_blocked()
            await pair.read(2 * len(FULL))
            for number in range(20):
                assert (await pair.read(2 + len(FULL)))[:2] == b"%02d" % number
                peak = max(peak, pair.writer.size)
        assert admitted == list(range(20))
        # Each writer that continues lets the next one continue before it has written itself.
        assert peak < 3 * len(FULL)


@pytest.mark.parametrize("attempt", range(5))
async def test_new_writer_does_not_overtake_a_waiting_one(
    anyio_backend: object, attempt: int
) -> None:
    async with socket_pair() as pair:
        pair.writer.write(FULL + b"x")
        admitted: list[int] = []

        async def write_late() -> None:
            # wait_sent() returns in the turn in which the first writer may continue.
            await pair.writer.wait_sent()
            assert pair.writer.size < MAX_QUEUED_BYTES
            await write_when_there_is_space(pair, 2, b"2", admitted)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write_late)
            await anyio.wait_all_tasks_blocked()
            pair.writer.write(FULL[1:])
            tasks.start_soon(write_when_there_is_space, pair, 1, b"1", admitted)
            await anyio.wait_all_tasks_blocked()
            assert (await pair.read(2 * len(FULL) + 2))[-2:] == b"12"
        assert admitted == [1, 2]


class WaitingWriter:
    """A task that waits for queue space, with AnyIO and native cancellation."""

    def __init__(self, pair: SocketPair, number: int, admitted: list[int]) -> None:
        self._scope = anyio.CancelScope()
        self._task: asyncio.Task[Any] | None = None
        self._wait = partial(write_when_there_is_space, pair, number, b"x", admitted)

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


async def test_cancelled_writer_lets_the_next_one_continue(anyio_backend: object) -> None:
    for style in cancel_styles():
        async with socket_pair() as pair:
            pair.writer.write(FULL * 2)
            admitted: list[int] = []
            waiting = [WaitingWriter(pair, number, admitted) for number in range(5)]
            async with anyio.create_task_group() as tasks:
                for one in waiting:
                    tasks.start_soon(one.run, style)
                    await anyio.wait_all_tasks_blocked()
                waiting[0].cancel()
                waiting[2].cancel()
                await pair.read(2 * len(FULL) + 3)
            assert admitted == [1, 3, 4]
            assert pair.writer.queued == 2 * len(FULL) + 3


async def test_writer_cancelled_on_its_turn_lets_the_next_one_continue(
    anyio_backend: object,
) -> None:
    for style in cancel_styles():
        async with socket_pair() as pair:
            pair.writer.write(FULL + b"x")
            admitted: list[int] = []
            waiting = [WaitingWriter(pair, number, admitted) for number in range(3)]

            async def cancel_after_sent(one: WaitingWriter, pair: SocketPair = pair) -> None:
                await pair.writer.wait_sent()
                one.cancel()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancel_after_sent, waiting[0])
                await anyio.wait_all_tasks_blocked()
                pair.writer.write(FULL[1:])
                for one in waiting:
                    tasks.start_soon(one.run, style)
                    await anyio.wait_all_tasks_blocked()
                await pair.read(2 * len(FULL) + 2)
            assert admitted[-2:] == [1, 2]
            assert pair.writer.queued == 2 * len(FULL) + len(admitted)


# wait_sent()


async def test_wait_sent_returns_after_the_queued_bytes_were_sent(anyio_backend: object) -> None:
    left = []

    async def wait(pair: SocketPair, mark: int) -> None:
        await pair.writer.wait_sent()
        assert pair.writer.sent >= mark
        left.append(mark)

    async with socket_pair() as pair:
        marks = []
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                pair.writer.write(FULL)
                marks.append(pair.writer.queued)
                tasks.start_soon(wait, pair, pair.writer.queued)
                await anyio.wait_all_tasks_blocked()
            assert not left
            for mark in marks:
                while pair.writer.sent < mark:
                    pair.read_available()
                    await checkpoint()
                await anyio.wait_all_tasks_blocked()
                assert mark in left
                assert marks[-1] not in left or mark == marks[-1]
        assert left == marks
        await pair.writer.wait_sent()


async def test_cancelled_wait_sent_does_not_affect_others(anyio_backend: object) -> None:
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


async def test_stop_releases_all_waiting_tasks(anyio_backend: object) -> None:
    async with socket_pair() as pair:
        pair.writer.write(FULL * 3)
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(pair.writer.wait_for_space)
                tasks.start_soon(pair.writer.wait_sent)
            await anyio.wait_all_tasks_blocked()
            pair.writer.stop()
        # Later calls return immediately, too.
        assert not pair.writer.has_space
        await pair.writer.wait_for_space()
        await pair.writer.wait_sent()


async def test_connection_error_is_raised_only_in_run(anyio_backend: object) -> None:
    pair = SocketPair()
    pair.peer.close()
    raised = []

    async def run() -> None:
        with pytest.raises(BrokenPipeError):
            await pair.writer.run()
        raised.append(True)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await anyio.wait_all_tasks_blocked()
        pair.writer.write(b"x")
        pair.writer.write(b"y")
        pair.writer.send_nowait()
        assert pair.writer.size == 2
        assert not raised
    assert raised
    await pair.transport.aclose()


async def test_send_nowait_sends_what_the_socket_accepts(anyio_backend: object) -> None:
    async with socket_pair() as pair:
        pair.writer.write(b"a")
        pair.writer.write(b"b")
        pair.writer.send_nowait()
        assert pair.read_available() == b"ab"
        assert pair.writer.size == 0


async def test_send_nowait_does_not_interfere_with_a_send_in_progress(
    anyio_backend: object,
) -> None:
    data = random.Random(4).randbytes(500_000)
    async with socket_pair() as pair:
        pair.writer.write(data)
        await anyio.wait_all_tasks_blocked()
        received = pair.read_available()
        # The socket would accept more, but the task is already sending it.
        sent = pair.writer.sent
        pair.writer.send_nowait()
        assert pair.writer.sent == sent
        received += await pair.read(len(data) - len(received))
        assert received == data


async def test_no_space_after_write_last(anyio_backend: object) -> None:
    async with socket_pair() as pair:
        assert pair.writer.has_space
        pair.writer.write_last(b"x")
        assert not pair.writer.has_space
        # wait_for_space() does not wait: its caller then finds that the client is leaving.
        await pair.writer.wait_for_space()


# Packets of which no byte was sent


class LimitedTransport(Transport):
    """
    A transport that accepts the given numbers of bytes, then blocks.

    :param sizes: the number of bytes that each send accepts
    :param may_send_part: whether a cancelled ``send()`` might have sent a part
    """

    def __init__(self, *sizes: int, may_send_part: bool = False) -> None:
        self.sizes = list(sizes)
        self.may_send_part = may_send_part

    async def receive(self, size: int = 65536, into: memoryview | None = None) -> bytes:
        raise NotImplementedError

    def try_send(self, data: bytes | memoryview) -> int:
        return 0 if self.may_send_part or not self.sizes else min(self.sizes.pop(0), len(data))

    async def send(self, data: bytes | memoryview) -> int:
        if self.may_send_part and self.sizes:
            await checkpoint()
            self.sizes.pop(0)
            return len(data)
        await anyio.sleep_forever()
        raise AssertionError("sleep_forever() returned")

    async def send_eof(self) -> None:
        raise NotImplementedError

    def interrupt(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError


async def untouched(transport: Transport, *packets: bytes) -> list[bytes]:
    """Write packets, and return those of which the transport sent no byte."""
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
    ("sizes", "expected"),
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
async def test_packet_is_untouched_until_its_first_byte_is_sent(
    anyio_backend: object, sizes: tuple[int, ...], expected: list[bytes]
) -> None:
    assert await untouched(LimitedTransport(*sizes), b"aaa", b"bb", b"c") == expected


async def test_whole_batch_passed_to_a_stream_is_touched(anyio_backend: object) -> None:
    # A batch passed to one send might have been sent in part.
    assert await untouched(LimitedTransport(may_send_part=True), b"aaa", b"bb") == []
    large = bytes(MAX_SEND_BYTES)
    assert await untouched(LimitedTransport(may_send_part=True), b"a", large, b"bb", b"c") == [
        b"bb",
        b"c",
    ]
    assert await untouched(LimitedTransport(1, may_send_part=True), large, b"bb", b"c") == []


async def test_packets_are_untouched_before_the_writer_runs(anyio_backend: object) -> None:
    writer = Writer(LimitedTransport(may_send_part=True))
    writer.write(b"aaa")
    assert writer.unsent_packets == [b"aaa"]


# A client's publishes


async def publish_numbered(
    emitter: Emitter, number: int, size: int, returned: list[int], qos: Any = 0
) -> None:
    await emitter.publish("k", "a/", b"%06d" % number + bytes(size), qos=qos)
    returned.append(number)


async def publish_and_cancel_many(emitter: Emitter, style: str, seed: int) -> tuple[set[int], int]:
    """Publish from many tasks, cancelling half of them, and return which calls returned."""
    rng = random.Random(seed)
    returned: list[int] = []
    native: list[asyncio.Task[None]] = []

    async def publish_and_cancel(number: int) -> None:
        size = rng.choice((0, 100, 10_000, 60_000))
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as pair:
                if rng.random() < 0.5:
                    pair.start_soon(cancel_later, scope.cancel)
                await publish_numbered(emitter, number, size, returned)

    async def cancel_later(cancel: Callable[[], object]) -> None:
        for _ in range(rng.randrange(30)):
            await checkpoint()
        cancel()

    async with anyio.create_task_group() as tasks:
        for number in range(200):
            if style == "scope":
                tasks.start_soon(publish_and_cancel, number)
                continue
            size = rng.choice((0, 100, 10_000, 60_000))
            task = asyncio.ensure_future(publish_numbered(emitter, number, size, returned))
            native.append(task)
            if rng.random() < 0.5:
                tasks.start_soon(cancel_later, task.cancel)
        if native:
            await asyncio.wait(native)
    return set(returned), len(returned)


@pytest.mark.parametrize("kind", TRANSPORTS)
async def test_cancelled_publish_is_sent_whole_or_not_at_all(
    anyio_backend: object, kind: str
) -> None:
    published: list[Packet] = []

    async def script(peer: Peer) -> None:
        # Read more slowly than the client writes, so that most publishers wait for queue space.
        await peer.accept()
        while packet := await peer.packet():
            for _ in range(3):
                await checkpoint()
            if packet.kind == DISCONNECT:
                break
            published.append(packet)
        assert not peer.unparsed

    async with serving(kind, script) as options:
        for style in cancel_styles():
            async with connect_once(**options) as emitter:
                returned, count = await publish_and_cancel_many(emitter, style, seed=3)
            numbers = [int(packet.payload[:6]) for packet in published]
            assert len(numbers) == len(set(numbers)) == count
            assert set(numbers) == returned
            assert count < 200
            published.clear()


async def test_publish_does_not_wait_for_a_stalled_connection(anyio_backend: object) -> None:
    proceed = anyio.Event()
    payloads: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.accept()
        await proceed.wait()
        payloads.extend(packet.payload for packet in await peer.rest() if packet.kind == PUBLISH)

    async with memory_peer(script, capacity=100) as connectable:
        async with connect_once(connectable=connectable) as emitter:
            # publish() waits for queue space only, although the first message fills the connection.
            for number in range(30):
                await emitter.publish("k", "a/", b"%02d" % number + bytes(2000))
            assert emitter.statistics().queued_bytes > 50_000
            proceed.set()
        assert [payload[:2] for payload in payloads] == [b"%02d" % number for number in range(30)]


async def test_waiting_calls_raise_when_the_connection_is_lost(
    anyio_backend: object,
) -> None:
    break_now = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await break_now.wait()

    lost = []

    async def expect_loss(call: Callable[[], Any]) -> None:
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
                                expect_loss,
                                partial(emitter.publish, "k", "a/", bytes(65000), qos=qos),
                            )
                            await anyio.wait_all_tasks_blocked()
                        tasks.start_soon(expect_loss, emitter.me)
                        tasks.start_soon(expect_loss, emitter.flush)
                        await anyio.wait_all_tasks_blocked()
                        break_now.set()
    assert len(lost) == 9
