"""A scripted peer that sends and receives MQTT packets as a test requires."""

from __future__ import annotations

import socket
import ssl
import struct
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeAlias

import anyio
from anyio import BrokenResourceError, EndOfStream
from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream

from tests.support import packets, tls
from tests.support.memory import MemoryConnectable, MemoryStream
from tests.support.websocket import ServerStream

CONNECT, PUBLISH, SUBSCRIBE, UNSUBSCRIBE, PINGREQ, DISCONNECT = 1, 3, 8, 10, 12, 14

Script: TypeAlias = Callable[["Peer"], Awaitable[None]]


class SocketStream(ByteStream):
    """A peer's end of a socket. It reads nothing until ``receive()`` is called."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        while True:
            await anyio.wait_readable(self.sock)
            with suppress(BlockingIOError):
                data = self.sock.recv(max_bytes)
                break
        if not data:
            raise EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        while item:
            await anyio.wait_writable(self.sock)
            with suppress(BlockingIOError):
                item = item[self.sock.send(item) :]

    async def send_eof(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        if self.sock.fileno() >= 0:
            anyio.notify_closing(self.sock)
            self.sock.close()


class Packet(NamedTuple):
    """A packet that the client sent."""

    kind: int
    flags: int
    body: bytes

    @property
    def topic(self) -> str:
        """The topic of a PUBLISH."""
        return self.body[2 : 2 + self._topic_size].decode()

    @property
    def payload(self) -> bytes:
        """The payload of a PUBLISH."""
        return self.body[2 + self._topic_size + (2 if self.flags & 6 else 0) :]

    @property
    def packet_id(self) -> int:
        """The packet id of a PUBLISH with QoS 1, a SUBSCRIBE or an UNSUBSCRIBE."""
        at = 2 + self._topic_size if self.kind == PUBLISH else 0
        return int.from_bytes(self.body[at : at + 2], "big")

    @property
    def _topic_size(self) -> int:
        return int.from_bytes(self.body[:2], "big")


class Peer:
    """
    The broker's side of one connection.

    :ivar received: all packets so far
    :ivar unparsed: the bytes after the last complete packet
    """

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.received: list[Packet] = []
        self.unparsed = bytearray()

    async def packet(self) -> Packet | None:
        """Receive a packet, or return ``None`` if the client has closed the connection."""
        while (packet := self._parse()) is None:
            try:
                self.unparsed += await self.stream.receive()
            except (EndOfStream, BrokenResourceError, OSError):
                return None
        self.received.append(packet)
        return packet

    async def until(self, kind: int) -> Packet:
        """Receive packets until one of this kind, and return it."""
        while packet := await self.packet():
            if packet.kind == kind:
                return packet
        raise AssertionError(f"the client closed the connection before a packet of type {kind}")

    async def rest(self) -> list[Packet]:
        """
        Receive packets until DISCONNECT or the end of the connection, and return them.

        Bytes after DISCONNECT are an error.
        """
        start = len(self.received)
        while (packet := await self.packet()) and packet.kind != DISCONNECT:
            pass
        assert not self.unparsed, f"unexpected bytes: {bytes(self.unparsed[:40])!r}"
        return self.received[start:]

    async def send(self, data: bytes) -> None:
        await self.stream.send(data)

    async def accept(self, code: int = 0) -> Packet:
        """Receive CONNECT and send CONNACK."""
        connect = await self.packet()
        if connect is None:
            raise EndOfStream
        assert connect.kind == CONNECT
        await self.send(packets.connack(code))
        return connect

    async def serve(self) -> None:
        """Accept the connection and acknowledge every packet until the client disconnects."""
        await self.accept()
        await self.answer_all()

    async def answer_all(self) -> None:
        """Acknowledge every packet until the client disconnects."""
        while (packet := await self.packet()) and packet.kind != DISCONNECT:
            await self.answer(packet)

    async def answer(self, packet: Packet) -> None:
        """Acknowledge a packet, if it requires that."""
        if packet.kind == PINGREQ:
            await self.send(packets.PINGRESP)
        elif packet.kind == SUBSCRIBE:
            await self.send(packets.suback(packet.packet_id, 0))
        elif packet.kind == UNSUBSCRIBE:
            await self.send(packets.unsuback(packet.packet_id))
        elif packet.kind == PUBLISH and packet.flags & 6:
            await self.send(packets.puback(packet.packet_id))

    def reset(self) -> None:
        """Make the socket close with a reset when the script ends."""
        stream: Any = self.stream
        if isinstance(stream, ServerStream):
            stream = stream.stream
        if isinstance(stream, TLSStream):
            stream = stream.transport_stream
        assert isinstance(stream, SocketStream)
        stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _parse(self) -> Packet | None:
        size, at = 0, 1
        while True:
            if at >= len(self.unparsed):
                return None
            byte = self.unparsed[at]
            size |= (byte & 127) << 7 * (at - 1)
            at += 1
            if byte < 128:
                break
        if len(self.unparsed) < at + size:
            return None
        first, body = self.unparsed[0], bytes(self.unparsed[at : at + size])
        del self.unparsed[: at + size]
        return Packet(first >> 4, first & 15, body)


class _ScriptRunner:
    """Runs a script for each client."""

    def __init__(
        self, script: Script, context: ssl.SSLContext | None = None, *, websocket: bool = False
    ) -> None:
        self._script = script
        self._context = context
        self._websocket = websocket
        self._clients = 0
        self._client_finished = anyio.Event()

    async def run(self, stream: ByteStream) -> None:
        self._clients += 1
        try:
            if self._context is not None:
                stream = await TLSStream.wrap(
                    stream, server_side=True, ssl_context=self._context, standard_compatible=False
                )
            if self._websocket:
                stream = await ServerStream.accept(stream)
            await self._script(Peer(stream))
        except* (EndOfStream, BrokenResourceError, OSError):
            # The client closed the connection, perhaps during the handshake.
            pass
        finally:
            await anyio.aclose_forcefully(stream)
            self._clients -= 1
            self._client_finished.set()

    async def wait_finished(self) -> None:
        """Wait until the script has ended for every client."""
        while self._clients:
            self._client_finished = anyio.Event()
            await self._client_finished.wait()


@asynccontextmanager
async def _listening(
    script: Script,
    listener: socket.socket,
    context: ssl.SSLContext | None,
    *,
    websocket: bool = False,
) -> AsyncGenerator[None]:
    runner = _ScriptRunner(script, context, websocket=websocket)

    async def accept() -> None:
        while True:
            await anyio.wait_readable(listener)
            with suppress(BlockingIOError):
                tasks.start_soon(runner.run, SocketStream(listener.accept()[0]))

    listener.setblocking(False)
    listener.listen()
    with listener:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(accept)
            yield
            await runner.wait_finished()
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def tcp_peer(
    script: Script, *, context: ssl.SSLContext | None = None, websocket: bool = False
) -> AsyncGenerator[int]:
    """Listen on 127.0.0.1, run the script for each client, and yield the port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    async with _listening(script, listener, context, websocket=websocket):
        yield listener.getsockname()[1]


def unix_socket() -> socket.socket:
    """Create a Unix socket. Type checkers that assume Windows reject ``socket.AF_UNIX``."""
    if sys.platform == "win32":
        raise NotImplementedError("Python has no Unix sockets on Windows")

    return socket.socket(socket.AF_UNIX)


@asynccontextmanager
async def unix_peer(script: Script, path: Path) -> AsyncGenerator[None]:
    """Listen on a Unix socket and run the script for each client."""
    listener = unix_socket()
    listener.bind(str(path))
    async with _listening(script, listener, None):
        yield


@asynccontextmanager
async def memory_peer(
    script: Script,
    *,
    capacity: int = 65536,
    before: Callable[[int], Awaitable[None]] | None = None,
    kind: type[MemoryStream] = MemoryStream,
    websocket: bool = False,
) -> AsyncGenerator[MemoryConnectable]:
    """Run the script for each client of an in-memory connectable, and yield the connectable."""
    connectable = MemoryConnectable(capacity, before, kind)
    runner = _ScriptRunner(script, websocket=websocket)

    async def accept() -> None:
        while True:
            tasks.start_soon(runner.run, await connectable.accept())

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(accept)
            yield connectable
            await runner.wait_finished()
            tasks.cancel_scope.cancel()
    finally:
        connectable.close()


TRANSPORTS = ("tcp", "tls", "ws", "wss", "unix", "memory")


@asynccontextmanager
async def serving(transport: str, script: Script) -> AsyncGenerator[dict[str, Any]]:
    """
    Run the script for each client that connects by one of the ``TRANSPORTS``.

    :return: a context manager that gives the options for :func:`emitter_anyio.connect`
    """
    if transport == "memory":
        async with memory_peer(script) as connectable:
            yield {"connectable": connectable}
    elif transport == "unix":
        with TemporaryDirectory(prefix="peer") as folder:
            async with unix_peer(script, Path(folder) / "s"):
                yield {"host": f"{folder}/s"}
    elif transport == "tls":
        async with tcp_peer(script, context=tls.server_context()) as port:
            yield {"host": "127.0.0.1", "port": port, "ssl_context": tls.client_context()}
    elif transport == "ws":
        async with tcp_peer(script, websocket=True) as port:
            yield {"servers": [f"ws://127.0.0.1:{port}"]}
    elif transport == "wss":
        async with tcp_peer(script, context=tls.server_context(), websocket=True) as port:
            yield {"servers": [f"wss://127.0.0.1:{port}"], "ssl_context": tls.client_context()}
    else:
        async with tcp_peer(script) as port:
            yield {"host": "127.0.0.1", "port": port, "secure": False}
