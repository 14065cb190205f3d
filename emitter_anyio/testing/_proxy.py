"""A TCP proxy that simulates network failures."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from types import TracebackType
from typing import Literal, Self, TypeAlias

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

from emitter_anyio._backend.interrupts import uninterrupted
from emitter_anyio._backend.tasks import Tasks

from ._service import Service
from ._sockets import SocketStream, accept, keep_accepting, listening, open_socket

#: One direction of a connection.
Direction: TypeAlias = Literal["to_broker", "to_client"]

_CHUNK_BYTES = 65536
#: The largest number of chunks that wait for the delay, per connection and direction.
_MAX_DELAYED_CHUNKS = 16


class FaultProxy:
    """
    A TCP proxy between clients and a broker that simulates network failures::

        async with FaultProxy(broker.host, broker.port) as proxy, connect(proxy.url) as emitter:
            proxy.stall("to_client")

    The proxy forwards bytes unchanged, so it works with any client and broker, with TLS and with
    WebSocket. Entering it starts listening on a free port of 127.0.0.1; leaving it closes all
    connections. Each setting applies to all existing and future connections.

    :param host: the host of the broker
    :param port: the port of the broker
    """

    def __init__(self, host: str, port: int) -> None:
        self._broker = host, port
        self._port = 0
        self._listening = ExitStack()
        self._connections: dict[_Connection, None] = {}
        self._settings: dict[Direction, _DirectionSettings] = {
            "to_broker": _DirectionSettings(),
            "to_client": _DirectionSettings(),
        }
        self._service = Service(type(self).__name__, self._start, self._end)

    @uninterrupted
    async def __aenter__(self) -> Self:
        await self._service.__aenter__()
        return self

    @uninterrupted
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._service.__aexit__(exc_type, exc, traceback)

    async def run(self, *, task_status: TaskStatus[FaultProxy] = TASK_STATUS_IGNORED) -> None:
        """
        Run the proxy in a task until it is cancelled: ``await task_group.start(proxy.run)``.

        :param task_status: receives this object when the proxy is listening
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
        """The address that the proxy listens on."""
        return "127.0.0.1"

    @property
    def port(self) -> int:
        """The port that the proxy listens on, a new one each time it is entered."""
        return self._port

    @property
    def url(self) -> str:
        """The URL for MQTT over TCP."""
        return f"mqtt://{self.host}:{self.port}"

    async def cut(self, *, reset: bool = True) -> None:
        """
        Close all connections, but continue to accept new ones.

        Returns when the connections are closed.

        :param reset: ``True`` to reset the connections like a crash, ``False`` to end the streams

        If cancelled, the connections are closed nevertheless.
        """
        connections = list(self._connections)
        self._cut(reset)
        for connection in connections:
            await connection.closed.wait()

    def cut_after(self, count: int, direction: Direction, *, reset: bool = True) -> None:
        """
        Close all connections, once, after a number of forwarded bytes.

        :param count: the number of bytes from now on, over all connections; with 0, the next byte
            closes the connections and is not forwarded
        :param direction: the direction to count in
        :param reset: as for :meth:`cut`; a reset might discard bytes that the receiver has not read
        :raises ValueError: if ``count`` is negative
        """
        self._settings[direction].stop_after(count, lambda: self._cut(reset))

    def stall(self, direction: Direction | None = None) -> None:
        """
        Stop forwarding until :meth:`resume`.

        The proxy buffers a small number of chunks, and then stops reading.

        :param direction: the direction to stop, or ``None`` for both
        """
        for settings in self._chosen(direction):
            settings.stall()

    def stall_after(self, count: int, direction: Direction) -> None:
        """
        Stop forwarding after a number of bytes until :meth:`resume`.

        :param count: the number of bytes from now on, over all connections
        :param direction: the direction to count in and to stop
        :raises ValueError: if ``count`` is negative
        """
        settings = self._settings[direction]
        settings.stop_after(count, settings.stall)

    def resume(self, direction: Direction | None = None) -> None:
        """
        Continue forwarding after :meth:`stall` or :meth:`stall_after`.

        :param direction: the direction to continue, or ``None`` for both
        """
        for settings in self._chosen(direction):
            settings.resume()

    async def half_close(self, direction: Direction) -> None:
        """
        End the streams in a direction, and keep the other direction open.

        The proxy discards the bytes of this direction that it has not forwarded yet and all that
        follow. New connections are not affected. Returns when the streams have ended.

        :param direction: the direction to end

        If cancelled, some of the streams might not have ended.
        """
        for connection in list(self._connections):
            await connection.half_close(direction)

    def split(self, size: int | None, direction: Direction | None = None) -> None:
        """
        Forward bytes in small pieces. The operating system might join them again.

        :param size: the size of the largest piece in bytes, or ``None`` to forward chunks as they
            arrive
        :param direction: the direction to split, or ``None`` for both
        :raises ValueError: if ``size`` is less than 1
        """
        if size is not None and size < 1:
            raise ValueError(f"invalid size: expected at least 1 byte, got {size}")
        for settings in self._chosen(direction):
            settings.split(size or _CHUNK_BYTES)

    def delay(self, seconds: float, direction: Direction | None = None) -> None:
        """
        Delay bytes that arrive from now on, by the clock of the event loop.

        :param seconds: the delay in seconds, at least 0
        :param direction: the direction to delay, or ``None`` for both
        :raises ValueError: if ``seconds`` is negative
        """
        if seconds < 0:
            raise ValueError(f"invalid seconds: expected at least 0, got {seconds:g}")
        for settings in self._chosen(direction):
            settings.delay(seconds)

    def _chosen(self, direction: Direction | None) -> list[_DirectionSettings]:
        return list(self._settings.values()) if direction is None else [self._settings[direction]]

    def _cut(self, reset: bool) -> None:
        for connection in self._connections:
            connection.cut(reset)

    async def _accept(self, sock: socket.socket, tasks: Tasks) -> None:
        tasks.start_soon(self._serve, await accept(sock))

    @uninterrupted
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
        connection = _Connection(client, broker, self._settings)
        self._connections[connection] = None
        try:
            await connection.run()
        finally:
            del self._connections[connection]


class _DirectionSettings:
    """The settings of a direction."""

    def __init__(self) -> None:
        self._piece_bytes = _CHUNK_BYTES
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
            raise ValueError(f"invalid count: expected at least 0 bytes, got {count}")
        self._left, self._stop = count, stop

    def split(self, piece_bytes: int) -> None:
        self._piece_bytes = piece_bytes

    def delay(self, seconds: float) -> None:
        self._latency = seconds

    def due(self) -> float:
        """Return the time at which to forward bytes that arrive now."""
        return current_time() + self._latency

    async def open(self) -> None:
        """Wait while this direction is stalled."""
        await checkpoint()  # the limit might have closed the connection
        while self._stalled is not None:
            await self._stalled.wait()

    async def forward(self, data: bytes, sink: ByteStream) -> None:
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


class _Connection:
    """A connection of a client through the proxy."""

    def __init__(
        self, client: ByteStream, broker: ByteStream, settings: dict[Direction, _DirectionSettings]
    ) -> None:
        self.closed = Event()
        self._reset = False
        self._scope = CancelScope()
        self._relays: dict[Direction, _Relay] = {
            "to_broker": _Relay(client, broker, settings["to_broker"], self._break),
            "to_client": _Relay(broker, client, settings["to_client"], self._break),
        }

    def cut(self, reset: bool) -> None:
        self._reset = reset
        self._scope.cancel()

    async def half_close(self, direction: Direction) -> None:
        await self._relays[direction].half_close()

    async def run(self) -> None:
        """Forward bytes until both directions have ended, or until :meth:`cut`."""
        try:
            with self._scope:
                async with create_task_group() as task_group:
                    for relay in self._relays.values():
                        task_group.start_soon(relay.run)
        finally:
            with CancelScope(shield=True):
                for relay in self._relays.values():
                    await relay.aclose(self._reset)
            self.closed.set()

    def _break(self) -> None:
        """Reset the connection, because one of its sides is broken."""
        self.cut(reset=True)


class _Relay:
    """A direction of a connection."""

    def __init__(
        self,
        source: ByteStream,
        sink: ByteStream,
        settings: _DirectionSettings,
        broken: Callable[[], None],
    ) -> None:
        self._source = source
        self._sink = sink
        self._settings = settings
        self._broken = broken
        self._sending = CancelScope()
        self._ended = Event()

    @uninterrupted
    async def run(self) -> None:
        """Forward bytes and the end of the stream."""
        received, due = create_memory_object_stream[tuple[float, bytes]](_MAX_DELAYED_CHUNKS)
        try:
            with due:
                async with create_task_group() as task_group:
                    task_group.start_soon(self._receive, received)
                    await self._send(due)
        finally:
            self._ended.set()

    async def half_close(self) -> None:
        self._sending.cancel()
        await self._ended.wait()

    async def aclose(self, reset: bool) -> None:
        if not reset:
            await self._send_eof()
        elif isinstance(self._sink, SocketStream):  # tests also use streams in memory
            await self._sink.reset()
        await aclose_forcefully(self._sink)

    @uninterrupted
    async def _receive(self, received: MemoryObjectSendStream[tuple[float, bytes]]) -> None:
        with received:
            try:
                while True:
                    await self._settings.open()
                    data = await self._source.receive(_CHUNK_BYTES)
                    await received.send((self._settings.due(), data))
            except EndOfStream:
                pass
            except BrokenResourceError:
                self._broken()

    async def _send(self, due: MemoryObjectReceiveStream[tuple[float, bytes]]) -> None:
        with self._sending:
            try:
                async for at, data in due:
                    await sleep_until(at)
                    await self._settings.forward(data, self._sink)
            except BrokenResourceError:
                self._broken()
        await self._send_eof()
        self._ended.set()
        async for _ in due:  # after half_close(), read on so that the sender is not blocked
            pass

    async def _send_eof(self) -> None:
        with suppress(OSError, BrokenResourceError, ClosedResourceError):
            await self._sink.send_eof()
