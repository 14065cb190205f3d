"""A network that fails when a test says so."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from anyio import (
    TASK_STATUS_IGNORED,
    BrokenResourceError,
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    Event,
    aclose_forcefully,
    create_memory_object_stream,
    create_task_group,
    current_time,
    sleep_until,
)
from anyio.abc import ByteStream, TaskStatus
from anyio.lowlevel import checkpoint
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from emitter_anyio._backend.tasks import Tasks

from ._service import Service
from ._sockets import SocketStream, accept, keep_accepting, listening, open_socket

#: One of the two ways through a link.
Direction: TypeAlias = Literal["to_broker", "to_client"]

_CHUNK = 65536
#: Chunks that are on their way in one direction of one link, while they wait for the latency.
_UNDER_WAY = 16


class FaultProxy:
    """
    A proxy between clients and a broker, for tests of what happens when the network fails::

        async with FaultProxy(broker.host, broker.port) as proxy, connect(proxy.url) as emitter:
            proxy.stall("to_client")

    It passes on whatever comes, so that client and broker may be any, and speak TLS or WebSocket
    through it. It listens on loopback from entering on; leaving cuts every link. What a knob sets
    is so for all links, those to come included.

    :param host: the broker's host
    :param port: the broker's port
    """

    def __init__(self, host: str, port: int) -> None:
        self._broker = host, port
        self._port = 0
        self._listening = ExitStack()
        self._links: dict[_Link, None] = {}
        self._lanes: dict[Direction, _Lane] = {"to_broker": _Lane(), "to_client": _Lane()}
        self._service = Service(type(self).__name__, self._start, self._end)

    async def __aenter__(self) -> Self:
        await self._service.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._service.__aexit__(exc_type, exc, traceback)

    async def run(self, *, task_status: TaskStatus[Any] = TASK_STATUS_IGNORED) -> None:
        """
        Run in a task, until it is cancelled: ``await task_group.start(proxy.run)``.

        :param task_status: gets this object as soon as it listens
        """
        await self._service.run(partial(task_status.started, self))

    async def _start(self, tasks: Tasks) -> None:
        sock = self._listening.enter_context(listening(self.host))
        self._port = sock.getsockname()[1]
        tasks.start_soon(keep_accepting, partial(self._accept, sock, tasks))

    async def _end(self, tasks: Tasks) -> None:
        tasks.stop()
        await tasks.stopped()
        self._listening.close()

    @property
    def host(self) -> str:
        """The address that it listens on."""
        return "127.0.0.1"

    @property
    def port(self) -> int:
        """The port that it listens on: another one each time it is entered."""
        return self._port

    @property
    def url(self) -> str:
        """The URL for a client that speaks MQTT over TCP."""
        return f"mqtt://{self.host}:{self.port}"

    async def cut(self, *, reset: bool = True) -> None:
        """
        Cut all links; new ones are taken. Returns when they are closed.

        :param reset: tell both sides with a reset, as a crash does, and not with an orderly end
        """
        links = list(self._links)
        self._cut(reset)
        for link in links:
            await link.closed.wait()

    def cut_after(self, count: int, direction: Direction, *, reset: bool = True) -> None:
        """
        Cut all links once so many bytes have been passed on.

        :param count: how many, from now on and over all links; 0 is when the next one comes
        :param reset: as for :meth:`cut`; a reset may lose bytes that the receiver has not read yet
        :raises ValueError: if ``count`` is negative
        """
        self._lanes[direction].stop_after(count, lambda: self._cut(reset))

    def stall(self, direction: Direction | None = None) -> None:
        """
        Pass nothing on until :meth:`resume`; what comes is kept, and then not read any more.

        :param direction: the one, or both unless given
        """
        for lane in self._chosen(direction):
            lane.stall()

    def stall_after(self, count: int, direction: Direction) -> None:
        """
        Pass on so many bytes, and then nothing until :meth:`resume`.

        :param count: how many, from now on and over all links
        :raises ValueError: if ``count`` is negative
        """
        lane = self._lanes[direction]
        lane.stop_after(count, lane.stall)

    def resume(self, direction: Direction | None = None) -> None:
        """Undo :meth:`stall`, for one direction or both."""
        for lane in self._chosen(direction):
            lane.resume()

    async def half_close(self, direction: Direction) -> None:
        """
        Tell the receivers of one direction that nothing more will come; the other goes on.

        What they have not got yet is dropped, as is all that comes later. Links to come are whole.
        Returns when that is done.
        """
        for link in list(self._links):
            await link.half_close(direction)

    def split(self, size: int | None, direction: Direction | None = None) -> None:
        """
        Pass bytes on in pieces; whether they arrive so is up to the system that joins them again.

        :param size: the largest piece, or ``None`` for what comes at once
        :param direction: the one, or both unless given
        :raises ValueError: if there can be no such piece
        """
        if size is not None and size < 1:
            raise ValueError(f"a piece has at least one byte, not {size}")
        for lane in self._chosen(direction):
            lane.split(size or _CHUNK)

    def delay(self, seconds: float, direction: Direction | None = None) -> None:
        """
        Pass on what comes from now on that much later, by the backend's clock.

        :param seconds: how much
        :param direction: the one, or both unless given
        :raises ValueError: if this is negative
        """
        if seconds < 0:
            raise ValueError("a proxy cannot pass on what has not come yet")
        for lane in self._chosen(direction):
            lane.delay(seconds)

    def _chosen(self, direction: Direction | None) -> list[_Lane]:
        return list(self._lanes.values()) if direction is None else [self._lanes[direction]]

    def _cut(self, reset: bool) -> None:
        for link in self._links:
            link.cut(reset)

    async def _accept(self, sock: socket.socket, tasks: Tasks) -> None:
        tasks.start_soon(self._serve, await accept(sock))

    async def _serve(self, client: SocketStream) -> None:
        try:
            broker = await open_socket(*self._broker)
        except OSError:
            await client.reset()
        else:
            await self._join(client, broker)
        finally:
            await client.aclose()

    async def _join(self, client: ByteStream, broker: ByteStream) -> None:
        link = _Link(client, broker, self._lanes)
        self._links[link] = None
        try:
            await link.run()
        finally:
            del self._links[link]


class _Lane:
    """What a test wants of one direction."""

    def __init__(self) -> None:
        self._piece_bytes = _CHUNK
        self._latency = 0.0
        self._left = math.inf
        self._stop: Callable[[], None] = lambda: None
        self._stalled: Event | None = None

    def stall(self) -> None:
        if self._stalled is None:
            self._stalled = Event()

    def resume(self) -> None:
        if self._stalled is not None:
            self._stalled.set()
            self._stalled = None

    def stop_after(self, count: int, stop: Callable[[], None]) -> None:
        if count < 0:
            raise ValueError(f"nothing stops after {count} bytes")
        self._left, self._stop = count, stop

    def split(self, piece_bytes: int) -> None:
        self._piece_bytes = piece_bytes

    def delay(self, seconds: float) -> None:
        self._latency = seconds

    def due(self) -> float:
        """Give the moment at which to pass on what comes now."""
        return current_time() + self._latency

    async def open(self) -> None:
        """Wait while this direction is stalled."""
        await checkpoint()  # what stops may also have cut
        while self._stalled is not None:
            await self._stalled.wait()

    async def pass_on(self, data: bytes, sink: ByteStream) -> None:
        while data:
            if self._left == 0:
                self._stop_now()
            await self.open()
            size = int(min(self._piece_bytes, self._left))
            piece, data = data[:size], data[size:]
            self._left -= len(piece)
            await sink.send(piece)
        if self._left == 0:
            self._stop_now()

    def _stop_now(self) -> None:
        self._left = math.inf
        self._stop()


class _Link:
    """One client's link through the proxy."""

    def __init__(
        self, client: ByteStream, broker: ByteStream, lanes: dict[Direction, _Lane]
    ) -> None:
        self.closed = Event()
        self._reset = False
        self._scope = CancelScope()
        self._ways: dict[Direction, _Way] = {
            "to_broker": _Way(client, broker, lanes["to_broker"], self._break),
            "to_client": _Way(broker, client, lanes["to_client"], self._break),
        }

    def cut(self, reset: bool) -> None:
        self._reset = reset
        self._scope.cancel()

    async def half_close(self, direction: Direction) -> None:
        await self._ways[direction].half_close()

    async def run(self) -> None:
        """Pass everything on until both directions have ended, or the link is cut."""
        try:
            with self._scope:
                async with create_task_group() as task_group:
                    for way in self._ways.values():
                        task_group.start_soon(way.run)
        finally:
            with CancelScope(shield=True):
                for way in self._ways.values():
                    await way.aclose(self._reset)
            self.closed.set()

    def _break(self) -> None:
        """As the one side has gone, so goes the other."""
        self.cut(reset=True)


class _Way:
    """One direction of one link."""

    def __init__(
        self, source: ByteStream, sink: ByteStream, lane: _Lane, broken: Callable[[], None]
    ) -> None:
        self._source = source
        self._sink = sink
        self._lane = lane
        self._broken = broken
        self._sending = CancelScope()
        self._ended = Event()

    async def run(self) -> None:
        """Pass on what comes, and its end."""
        came, due = create_memory_object_stream[tuple[float, bytes]](_UNDER_WAY)
        try:
            with due:
                async with create_task_group() as task_group:
                    task_group.start_soon(self._receive, came)
                    await self._send(due)
        finally:
            self._ended.set()

    async def half_close(self) -> None:
        self._sending.cancel()
        await self._ended.wait()

    async def aclose(self, reset: bool) -> None:
        if not reset:
            await self._send_eof()
        elif isinstance(self._sink, SocketStream):  # a test may have a link in memory
            await self._sink.reset()
        await aclose_forcefully(self._sink)

    async def _receive(self, came: MemoryObjectSendStream[tuple[float, bytes]]) -> None:
        with came:
            try:
                while True:
                    await self._lane.open()
                    data = await self._source.receive(_CHUNK)
                    await came.send((self._lane.due(), data))
            except EndOfStream:
                pass
            except BrokenResourceError:
                self._broken()

    async def _send(self, due: MemoryObjectReceiveStream[tuple[float, bytes]]) -> None:
        with self._sending:
            try:
                async for at, data in due:
                    await sleep_until(at)
                    await self._lane.pass_on(data, self._sink)
            except BrokenResourceError:
                self._broken()
        await self._send_eof()
        self._ended.set()
        async for _ in due:  # half closed: read on, so that the sender notices nothing
            pass

    async def _send_eof(self) -> None:
        with suppress(OSError, BrokenResourceError, ClosedResourceError):
            await self._sink.send_eof()
