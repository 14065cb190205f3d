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
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def open_reader(sock: socket.socket) -> Reader:
    return current_backend().open_reader(sock)


def waiting_reader(sock: socket.socket) -> Reader:
    return WaitingReader(sock, asyncio.get_running_loop().time)


def is_watched(sock: socket.socket) -> bool:
    """Tell whether the loop looks at a socket."""
    loop = asyncio.get_running_loop()
    return sock.fileno() in loop._selector.get_map()  # type: ignore[attr-defined]  # selects


def fill(sock: socket.socket) -> int:
    """Send until the socket takes no more, and tell how much it took."""
    sent = 0
    try:
        while True:
            sent += sock.send(bytes(READ_CHUNK_BYTES))
    except BlockingIOError:
        return sent


async def test_it_reads_one_chunk_ahead_and_then_holds_the_peer_up(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    reader = open_reader(ours)
    assert isinstance(reader, WatchingReader)
    sent = fill(theirs)
    while is_watched(ours):
        await checkpoint()
    sent += fill(theirs)
    for _ in range(10):
        await checkpoint()
    sent += fill(theirs)
    theirs.shutdown(socket.SHUT_WR)
    received = 0
    while data := await reader.receive(READ_CHUNK_BYTES):
        assert len(data) <= READ_CHUNK_BYTES
        received += len(data)
    assert received == sent
    reader.close()
    assert not is_watched(ours)


async def test_bytes_are_heard_before_a_task_reads_them(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    reader = open_reader(ours)
    before = reader.last_heard.time
    theirs.send(b"x")
    while reader.last_heard.time == before:
        await checkpoint()
    assert before < reader.last_heard.time <= asyncio.get_running_loop().time()
    assert await reader.receive(READ_CHUNK_BYTES) == b"x"
    reader.close()


async def test_what_came_as_it_was_cancelled_is_there_for_the_next(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    reader = open_reader(ours)
    task = asyncio.create_task(reader.receive(READ_CHUNK_BYTES))
    await checkpoint()
    theirs.send(b"x")
    while not task._fut_waiter.done():  # type: ignore[attr-defined]  # a turn before it runs
        await asyncio.sleep(0)
        if task.done():
            pytest.fail("it ran before it could be cancelled")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await reader.receive(READ_CHUNK_BYTES) == b"x"
    reader.close()


async def test_a_link_that_is_reset(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    reader = open_reader(ours)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    with pytest.raises(ConnectionResetError):
        await reader.receive(READ_CHUNK_BYTES)
    reader.close()


async def test_closing_it_lets_go_who_waits(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = pair
    reader = open_reader(ours)

    async def receive() -> None:
        with pytest.raises(ClosedResourceError):
            await reader.receive(READ_CHUNK_BYTES)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        reader.close()


async def test_closing_it_leaves_what_has_come(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    reader = open_reader(ours)
    assert isinstance(reader, WatchingReader)
    theirs.send(b"x")
    while reader._received is None:
        await checkpoint()
    reader.close()
    assert await reader.receive(READ_CHUNK_BYTES) == b"x"
    with pytest.raises(ClosedResourceError):
        await reader.receive(READ_CHUNK_BYTES)
    assert not is_watched(ours)


@pytest.mark.parametrize("make", [waiting_reader, open_reader])
async def test_one_that_is_closed_reads_no_more(
    pair: tuple[socket.socket, socket.socket], make: Callable[[socket.socket], Reader]
) -> None:
    ours, theirs = pair
    reader = make(ours)
    reader.close()
    theirs.send(b"x")
    for _ in range(2):
        with pytest.raises(ClosedResourceError):
            await reader.receive(READ_CHUNK_BYTES)


async def test_a_loop_that_watches_no_sockets(
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
