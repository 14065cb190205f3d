"""A scripted peer: it speaks MQTT by hand, and says just what a test wants."""

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
    """A peer's end of a socket, which reads no byte before it is asked to."""

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
    """A packet that the client has sent."""

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
        """The packet id of a PUBLISH of QoS 1, a SUBSCRIBE or an UNSUBSCRIBE."""
        at = 2 + self._topic_size if self.kind == PUBLISH else 0
        return int.from_bytes(self.body[at : at + 2], "big")

    @property
    def _topic_size(self) -> int:
        return int.from_bytes(self.body[:2], "big")


class Peer:
    """
    The broker's side of one link.

    :ivar received: every packet taken so far
    :ivar left: bytes behind the last whole packet
    """

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.received: list[Packet] = []
        self.left = bytearray()

    async def packet(self) -> Packet | None:
        """Wait for a packet; ``None`` when the client has closed the link."""
        while (packet := self._parse()) is None:
            try:
                self.left += await self.stream.receive()
            except (EndOfStream, BrokenResourceError, OSError):
                return None
        self.received.append(packet)
        return packet

    async def until(self, kind: int) -> Packet:
        """Take packets up to one of this kind."""
        while packet := await self.packet():
            if packet.kind == kind:
                return packet
        raise AssertionError(f"the client has closed the link without a packet of type {kind}")

    async def rest(self) -> list[Packet]:
        """Take all up to DISCONNECT, or to the end of the link; anything behind is an error."""
        start = len(self.received)
        while (packet := await self.packet()) and packet.kind != DISCONNECT:
            pass
        assert not self.left, f"{len(self.left)} bytes behind: {bytes(self.left[:40])!r}"
        return self.received[start:]

    async def send(self, data: bytes) -> None:
        await self.stream.send(data)

    async def accept(self, code: int = 0) -> Packet:
        """Take CONNECT and answer it."""
        connect = await self.packet()
        if connect is None:
            raise EndOfStream
        assert connect.kind == CONNECT
        await self.send(packets.connack(code))
        return connect

    async def serve(self) -> None:
        """Be a broker that refuses nothing."""
        await self.accept()
        await self.answer_all()

    async def answer_all(self) -> None:
        """Answer what comes until the client leaves."""
        while (packet := await self.packet()) and packet.kind != DISCONNECT:
            await self.answer(packet)

    async def answer(self, packet: Packet) -> None:
        """Answer one packet."""
        if packet.kind == PINGREQ:
            await self.send(packets.PINGRESP)
        elif packet.kind == SUBSCRIBE:
            await self.send(packets.suback(packet.packet_id, 0))
        elif packet.kind == UNSUBSCRIBE:
            await self.send(packets.unsuback(packet.packet_id))
        elif packet.kind == PUBLISH and packet.flags & 6:
            await self.send(packets.puback(packet.packet_id))

    def reset(self) -> None:
        """Have the link, a socket, end with a reset when the script ends."""
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
            if at >= len(self.left):
                return None
            byte = self.left[at]
            size |= (byte & 127) << 7 * (at - 1)
            at += 1
            if byte < 128:
                break
        if len(self.left) < at + size:
            return None
        packet = Packet(self.left[0] >> 4, self.left[0] & 15, bytes(self.left[at : at + size]))
        del self.left[: at + size]
        return packet


class _Playing:
    """A script being played to clients."""

    def __init__(
        self, script: Script, context: ssl.SSLContext | None = None, *, websocket: bool = False
    ) -> None:
        self._script = script
        self._context = context
        self._websocket = websocket
        self._clients = 0
        self._one_less = anyio.Event()

    async def play(self, stream: ByteStream) -> None:
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
            # The client has gone, perhaps in the middle of the handshake.
            pass
        finally:
            await anyio.aclose_forcefully(stream)
            self._clients -= 1
            self._one_less.set()

    async def done(self) -> None:
        """Wait until the script has been played to the end, to each client."""
        while self._clients:
            self._one_less = anyio.Event()
            await self._one_less.wait()


@asynccontextmanager
async def _listening(
    script: Script,
    listener: socket.socket,
    context: ssl.SSLContext | None,
    *,
    websocket: bool = False,
) -> AsyncGenerator[None]:
    playing = _Playing(script, context, websocket=websocket)

    async def accept() -> None:
        while True:
            await anyio.wait_readable(listener)
            with suppress(BlockingIOError):
                tasks.start_soon(playing.play, SocketStream(listener.accept()[0]))

    listener.setblocking(False)
    listener.listen()
    with listener:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(accept)
            yield
            await playing.done()
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def tcp_peer(
    script: Script, *, context: ssl.SSLContext | None = None, websocket: bool = False
) -> AsyncGenerator[int]:
    """Play the script to each client of a port of 127.0.0.1, which it gives."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    async with _listening(script, listener, context, websocket=websocket):
        yield listener.getsockname()[1]


def unix_socket() -> socket.socket:
    """Make a Unix socket, of which type checkers know nothing on Windows."""
    if sys.platform == "win32":
        raise NotImplementedError("Python has no Unix sockets on Windows")

    return socket.socket(socket.AF_UNIX)


@asynccontextmanager
async def unix_peer(script: Script, path: Path) -> AsyncGenerator[None]:
    """Play the script to each client of a Unix socket."""
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
    """Play the script to each client of a connectable in memory, which it gives."""
    connectable = MemoryConnectable(capacity, before, kind)
    playing = _Playing(script, websocket=websocket)

    async def accept() -> None:
        while True:
            tasks.start_soon(playing.play, await connectable.accept())

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(accept)
            yield connectable
            await playing.done()
            tasks.cancel_scope.cancel()
    finally:
        connectable.close()


LINKS = ("tcp", "tls", "ws", "wss", "unix", "memory")


@asynccontextmanager
async def serving(link: str, script: Script) -> AsyncGenerator[dict[str, Any]]:
    """
    Play the script behind one of the ``LINKS``.

    :return: the options with which a client gets there
    """
    if link == "memory":
        async with memory_peer(script) as connectable:
            yield {"connectable": connectable}
    elif link == "unix":
        with TemporaryDirectory(prefix="peer") as folder:
            async with unix_peer(script, Path(folder) / "s"):
                yield {"host": f"{folder}/s"}
    elif link == "tls":
        async with tcp_peer(script, context=tls.server_context()) as port:
            yield {"host": "127.0.0.1", "port": port, "ssl_context": tls.client_context()}
    elif link == "ws":
        async with tcp_peer(script, websocket=True) as port:
            yield {"servers": [f"ws://127.0.0.1:{port}"]}
    elif link == "wss":
        async with tcp_peer(script, context=tls.server_context(), websocket=True) as port:
            yield {"servers": [f"wss://127.0.0.1:{port}"], "ssl_context": tls.client_context()}
    else:
        async with tcp_peer(script) as port:
            yield {"host": "127.0.0.1", "port": port, "secure": False}
