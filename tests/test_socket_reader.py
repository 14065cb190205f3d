from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterator

import anyio
import pytest
from anyio import ClosedResourceError
from anyio.lowlevel import checkpoint

from emitter_anyio._backend import READ_CHUNK_BYTES, Reader, current_backend
from emitter_anyio._backend.asyncio import WatchingReader
from emitter_anyio._backend.interface import WaitingReader

pytestmark = pytest.mark.parametrize("anyio_backend", ["asyncio"])


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        own_end = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    own_end.setblocking(False)
    peer.setblocking(False)
    with own_end, peer:
        yield own_end, peer


def open_reader(sock: socket.socket) -> Reader:
    return current_backend().open_reader(sock)


def waiting_reader(sock: socket.socket) -> Reader:
    return WaitingReader(sock, asyncio.get_running_loop().time)


def is_watched(sock: socket.socket) -> bool:
    """Return whether the event loop watches a socket."""
    loop = asyncio.get_running_loop()
    return sock.fileno() in loop._selector.get_map()  # type: ignore[attr-defined]  # selects


def fill(sock: socket.socket) -> int:
    """Send until the socket is full, and return the number of bytes."""
    sent = 0
    try:
        while True:
            sent += sock.send(bytes(READ_CHUNK_BYTES))
    except BlockingIOError:
        return sent


async def test_reader_reads_one_chunk_ahead_and_then_stops(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    own_end, peer = pair
    reader = open_reader(own_end)
    assert isinstance(reader, WatchingReader)
    sent = fill(peer)
    while is_watched(own_end):
        await checkpoint()
    sent += fill(peer)
    for _ in range(10):
        await checkpoint()
    sent += fill(peer)
    peer.shutdown(socket.SHUT_WR)
    received = 0
    while data := await reader.receive(READ_CHUNK_BYTES):
        assert len(data) <= READ_CHUNK_BYTES
        received += len(data)
    assert received == sent
    reader.close()
    assert not is_watched(own_end)


async def test_last_heard_is_updated_before_a_task_receives(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    own_end, peer = pair
    reader = open_reader(own_end)
    before = reader.last_heard.time
    peer.send(b"x")
    while reader.last_heard.time == before:
        await checkpoint()
    assert before < reader.last_heard.time <= asyncio.get_running_loop().time()
    assert await reader.receive(READ_CHUNK_BYTES) == b"x"
    reader.close()


async def test_bytes_that_arrive_as_a_receive_is_cancelled_are_kept(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    own_end, peer = pair
    reader = open_reader(own_end)
    task = asyncio.create_task(reader.receive(READ_CHUNK_BYTES))
    await checkpoint()
    peer.send(b"x")
    while not task._fut_waiter.done():  # type: ignore[attr-defined]  # one turn before the task runs
        await asyncio.sleep(0)
        if task.done():
            pytest.fail("the task ran before it was cancelled")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await reader.receive(READ_CHUNK_BYTES) == b"x"
    reader.close()


@pytest.mark.parametrize("make", [waiting_reader, open_reader])
async def test_bytes_are_received_into_the_given_memory(
    pair: tuple[socket.socket, socket.socket], make: Callable[[socket.socket], Reader]
) -> None:
    own_end, peer = pair
    reader = make(own_end)
    memory = bytearray(10)
    peer.send(b"abc")
    received = await reader.receive(READ_CHUNK_BYTES, memoryview(memory)[2:])
    assert isinstance(received, memoryview)
    assert received.obj is memory
    assert bytes(received) == b"abc"
    assert memory == b"\0\0abc\0\0\0\0\0"
    peer.send(b"d")
    assert await reader.receive(READ_CHUNK_BYTES) == b"d"
    peer.shutdown(socket.SHUT_WR)
    assert not await reader.receive(READ_CHUNK_BYTES, memoryview(memory))
    assert memory == b"\0\0abc\0\0\0\0\0"
    reader.close()


async def test_reading_ahead_does_not_use_memory_given_before(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    own_end, peer = pair
    reader = open_reader(own_end)
    assert isinstance(reader, WatchingReader)
    memory = bytearray(3)
    peer.send(b"abc")
    await reader.receive(READ_CHUNK_BYTES, memoryview(memory))
    peer.send(b"defg")
    while reader._received is None:
        await checkpoint()
    assert memory == b"abc"
    assert await reader.receive(READ_CHUNK_BYTES, memoryview(memory)) == b"defg"
    assert memory == b"abc"
    reader.close()


async def test_reset_connection_raises(pair: tuple[socket.socket, socket.socket]) -> None:
    own_end, peer = pair
    reader = open_reader(own_end)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    with pytest.raises(ConnectionResetError):
        await reader.receive(READ_CHUNK_BYTES)
    reader.close()


async def test_closing_the_reader_wakes_a_waiting_task(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    own_end, _ = pair
    reader = open_reader(own_end)

    async def receive() -> None:
        with pytest.raises(ClosedResourceError):
            await reader.receive(READ_CHUNK_BYTES)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        reader.close()


async def test_bytes_received_before_closing_can_be_read(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    own_end, peer = pair
    reader = open_reader(own_end)
    assert isinstance(reader, WatchingReader)
    peer.send(b"x")
    while reader._received is None:
        await checkpoint()
    reader.close()
    assert await reader.receive(READ_CHUNK_BYTES) == b"x"
    with pytest.raises(ClosedResourceError):
        await reader.receive(READ_CHUNK_BYTES)
    assert not is_watched(own_end)


@pytest.mark.parametrize("make", [waiting_reader, open_reader])
async def test_closed_reader_raises(
    pair: tuple[socket.socket, socket.socket], make: Callable[[socket.socket], Reader]
) -> None:
    own_end, peer = pair
    reader = make(own_end)
    reader.close()
    peer.send(b"x")
    for _ in range(2):
        with pytest.raises(ClosedResourceError):
            await reader.receive(READ_CHUNK_BYTES)


async def test_event_loop_without_add_reader(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_reader(*args: object) -> None:
        raise NotImplementedError

    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "add_reader", add_reader)
        reader = open_reader(pair[0])
    assert isinstance(reader, WaitingReader)
    pair[1].send(b"x")
    assert await reader.receive(READ_CHUNK_BYTES) == b"x"
    reader.close()
