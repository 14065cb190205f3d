"""Byte transports: TCP, Unix sockets, TLS, WebSocket and connectables.

A transport has one reader and one writer. :meth:`Transport.try_send` sends without waiting, and
the writer task sends the rest with :meth:`Transport.send`. A cancelled ``send()`` might have sent
part of a packet. Therefore only the writer task, which is cancelled when the connection ends,
awaits it, and never the caller of a method.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Final

import anyio
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.abc import ByteStream
from anyio.lowlevel import checkpoint
from anyio.streams.tls import TLSStream

from emitter_anyio._backend import READ_CHUNK_BYTES, LastHeard, current_backend
from emitter_anyio._backend.tasks import Tasks

from .options import Options, Server
from .tls import client_context, explain

if TYPE_CHECKING:
    # It requires wsproto, which is an optional dependency.
    from .websocket import WebSocket

# EAGAIN is not included: connecting to a Unix socket with a full backlog fails with it.
_IN_PROGRESS: Final = {errno.EINPROGRESS, getattr(errno, "WSAEWOULDBLOCK", errno.EINPROGRESS)}

_CLOSE_SECONDS: Final = 1.0
"""
The maximum time for closing, in seconds: for receiving the body of a refused handshake, and for
answering the peer's close frame.
"""

_NEXT_ADDRESS_SECONDS: Final = 0.25
"""The delay before also trying the next address of a server, in seconds, as in AnyIO."""

TRANSPORT_ERRORS: Final = (OSError, BrokenResourceError, ClosedResourceError, EndOfStream)
"""The exceptions that a transport raises when the connection is broken."""


class Transport(ABC):
    """A bidirectional stream of bytes to a broker."""

    may_send_part: bool
    """Whether a :meth:`send` that fails or is cancelled might have sent part of the data."""

    last_heard: LastHeard
    """The time at which bytes last arrived from the broker."""

    @abstractmethod
    async def receive(
        self, size: int = READ_CHUNK_BYTES, into: memoryview | None = None
    ) -> bytes | memoryview:
        """
        Wait for bytes from the peer.

        :param size: the maximum number of bytes to return, unless they are received into ``into``
        :param into: the memory into which a socket receives, to save a copy
        :return: at least one byte, or the filled part of ``into``; an empty result if the peer has
            closed its side
        """

    @abstractmethod
    def try_send(self, data: bytes | memoryview) -> int:
        """Send what is possible without waiting, and return the number of bytes sent."""

    @abstractmethod
    async def send(self, data: bytes | memoryview) -> int:
        """Wait until some bytes are sent, and return their number."""

    @abstractmethod
    async def send_eof(self) -> None:
        """Close the sending side, if the transport supports that. The peer may still send."""

    def listening(self) -> AbstractContextManager[object]:
        """Return a context manager that the reader enters around its calls of :meth:`receive`."""
        return nullcontext()

    @abstractmethod
    def interrupt(self) -> None:
        """
        End reading permanently.

        Either :meth:`receive` raises :exc:`~anyio.ClosedResourceError`, or the body of
        :meth:`listening` is cancelled.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close immediately. It also works when cancelled, and a second call has no effect."""

    def set_waker(self, wake: Callable[[], None]) -> None:  # noqa: B027 - only WebSocket needs it
        """
        Set the function that makes the writer task call :meth:`send_control`.

        :param wake: called when the transport has control frames to send
        """

    async def send_control(self) -> None:  # noqa: B027 - only WebSocket needs it
        """Send pending control frames, such as the answer to a ping."""


class SocketTransport(Transport):
    """A non-blocking TCP or Unix socket."""

    may_send_part = False

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = current_backend().open_reader(sock)
        self.last_heard = self._reader.last_heard
        self._has_waited = False
        """Whether :meth:`send` has ever waited, so that closing must notify AnyIO."""

    async def receive(
        self, size: int = READ_CHUNK_BYTES, into: memoryview | None = None
    ) -> bytes | memoryview:
        return await self._reader.receive(size, into)

    def try_send(self, data: bytes | memoryview) -> int:
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0

    async def send(self, data: bytes | memoryview) -> int:
        while not (sent := self.try_send(data)):
            self._has_waited = True
            await anyio.wait_writable(self._sock)
        return sent

    async def send_eof(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def interrupt(self) -> None:
        self._reader.close()

    async def aclose(self) -> None:
        if self._sock.fileno() >= 0:
            # Wake waiting tasks before the file descriptor can be reused.
            self._reader.close()
            if self._has_waited:
                anyio.notify_closing(self._sock)
            self._sock.close()


class StreamTransport(Transport):
    """
    An AnyIO byte stream: TLS, or the stream of a ``connectable``.

    :param below: the transport below TLS, which records when bytes arrive
    """

    may_send_part = True

    def __init__(self, stream: ByteStream, below: Transport | None = None) -> None:
        self._stream = stream
        self._receives = below is None
        self.last_heard = LastHeard(current_backend().clock) if below is None else below.last_heard
        self._listening = anyio.CancelScope()

    async def receive(self, size: int = READ_CHUNK_BYTES, into: memoryview | None = None) -> bytes:
        try:
            data = await self._stream.receive(size)
        except EndOfStream:
            return b""
        except BrokenResourceError as exc:
            raise _to_os_error(exc) from exc
        except ssl.SSLError as exc:
            explain(exc)
            raise
        if self._receives:
            self.last_heard.note()
        return data

    def try_send(self, data: bytes | memoryview) -> int:
        return 0

    async def send(self, data: bytes | memoryview) -> int:
        try:
            await self._stream.send(bytes(data))
        except BrokenResourceError as exc:
            raise _to_os_error(exc) from exc
        return len(data)

    async def send_eof(self) -> None:
        # AnyIO's TLS stream raises NotImplementedError, or TypeError if it is broken.
        with suppress(NotImplementedError, TypeError, *TRANSPORT_ERRORS):
            await self._stream.send_eof()

    def listening(self) -> AbstractContextManager[object]:
        return self._listening

    def interrupt(self) -> None:
        # Closing the transport below is not enough: a TLS read might be waiting in a send.
        self._listening.cancel()

    async def aclose(self) -> None:
        # If closing fails, the stream is unusable anyway.
        with suppress(Exception):
            await anyio.aclose_forcefully(self._stream)


class WebSocketTransport(Transport):
    """
    A WebSocket connection over another transport.

    Whole frames are added to one buffer and sent in order, so that frames never interleave. The
    reader never waits in a send: the writer task sends the answers to pings, because a peer might
    not read before the client reads.

    :param below: the transport that carries the frames
    :param websocket: encodes and decodes the frames
    :param received: the bytes that followed the handshake
    """

    may_send_part = True

    def __init__(self, below: Transport, websocket: WebSocket, received: bytes) -> None:
        self.last_heard = LastHeard(below.last_heard.clock)
        self._below = below
        self._websocket = websocket
        self._carried = websocket.receive(received)
        self._unsent = bytearray()
        self._sending = anyio.Lock(fast_acquire=True)
        self._wake: Callable[[], None] | None = None
        self._closing: anyio.CancelScope | None = None
        """The scope in which the reader answers the peer's close frame."""

    async def receive(self, size: int = READ_CHUNK_BYTES, into: memoryview | None = None) -> bytes:
        while not self._carried:
            if self._websocket.end is not None:
                with anyio.move_on_after(_CLOSE_SECONDS) as self._closing:
                    await self.send_eof()
                raise self._websocket.end
            if self._websocket.turn_over:
                await checkpoint()
                data = b""
            elif not (data := bytes(await self._below.receive(size))):
                return b""
            self._carried = self._websocket.receive(data)
            if self._websocket.pong and self._wake is not None:
                self._wake()
        # Ignore frames that carry no MQTT: a proxy's pings do not show that the broker is alive.
        self.last_heard.follow(self._below.last_heard)
        carried, self._carried = self._carried, b""
        return carried

    def try_send(self, data: bytes | memoryview) -> int:
        # Only a socket can send without waiting, so do not encode a frame for other transports.
        if self._unsent or not self._websocket.open or not isinstance(self._below, SocketTransport):
            return 0
        frame = self._websocket.wrap(bytes(data))
        if sent := self._below.try_send(frame):
            self._unsent += frame[sent:]
            return len(data)
        return 0

    async def send(self, data: bytes | memoryview) -> int:
        if self._websocket.end is not None:
            raise self._websocket.end
        self._unsent += self._websocket.wrap(bytes(data))
        await self.send_control()
        return len(data)

    def set_waker(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        if self._websocket.pong:
            wake()

    async def send_control(self) -> None:
        async with self._sending:
            while self._unsent or self._websocket.pong:
                self._unsent += self._websocket.take_pong()
                del self._unsent[: await self._below.send(bytes(self._unsent))]

    async def send_eof(self) -> None:
        with suppress(*TRANSPORT_ERRORS):
            self._unsent += self._websocket.close()
            await self.send_control()

    def listening(self) -> AbstractContextManager[object]:
        return self._below.listening()

    def interrupt(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
        self._below.interrupt()

    async def aclose(self) -> None:
        with suppress(*TRANSPORT_ERRORS):
            # A close frame cannot follow half a frame.
            if not self._unsent:
                self._below.try_send(self._websocket.close())
        await self._below.aclose()


class _SocketStream(ByteStream):
    """A socket transport with the interface that AnyIO's TLS stream requires."""

    def __init__(self, transport: SocketTransport) -> None:
        self._transport = transport
        self._sending = anyio.Lock(fast_acquire=True)

    async def receive(self, max_bytes: int = READ_CHUNK_BYTES) -> bytes:
        if data := bytes(await self._transport.receive(max_bytes)):
            return data
        raise EndOfStream

    async def send(self, item: bytes) -> None:
        # The reader sends as well when the peer updates the TLS keys.
        async with self._sending:
            while item:
                item = item[await self._transport.send(item) :]

    async def send_eof(self) -> None:
        raise NotImplementedError("TLS cannot close one direction")

    async def aclose(self) -> None:
        await self._transport.aclose()


async def open_transport(server: Server, options: Options, tasks: Tasks) -> Transport:
    """
    Open a transport to a server.

    :raises OSError: if the server cannot be reached
    :raises EOFError: if the server closes the connection during a handshake
    :raises ssl.SSLError: if the TLS handshake fails
    :raises ConnectError: if the server refuses the WebSocket handshake
    :raises RemoteProtocolError: if the response to the WebSocket handshake is invalid

    Cancelling it closes any socket that it has opened.
    """
    transport = await _open_below(server, options, tasks)
    if not server.websocket:
        return transport
    try:
        return await _upgrade(transport, server, options)
    except BaseException:
        await transport.aclose()
        raise


async def _open_below(server: Server, options: Options, tasks: Tasks) -> Transport:
    if options.connectable is not None:
        stream = await options.connectable.connect()
        if not server.secure:
            return StreamTransport(stream)
        try:
            context = await client_context(options.ssl_context)
            return StreamTransport(await _wrap(stream, server, context))
        except BaseException:
            await anyio.aclose_forcefully(stream)
            raise
    if server.scheme == "unix":
        if sys.platform == "win32":  # pragma: no cover - not on Linux
            raise OSError("Python has no Unix sockets on Windows")
        return SocketTransport(await _connect(socket.AF_UNIX, server.host))
    if server.secure:
        return await _open_tls(server, await client_context(options.ssl_context), tasks)
    return SocketTransport(await _connect_tcp(server, tasks))


async def _upgrade(below: Transport, server: Server, options: Options) -> Transport:
    from .websocket import Upgrade, WebSocket

    upgrade = Upgrade(host_header(server), server.path, options.headers)
    request = upgrade.request
    while request:
        request = request[await below.send(request) :]
    with anyio.CancelScope() as patience:
        while (received := upgrade.receive(bytes(await below.receive()))) is None:
            if upgrade.refused:
                patience.deadline = min(patience.deadline, anyio.current_time() + _CLOSE_SECONDS)
        return WebSocketTransport(below, WebSocket(options.max_message_size), received)
    raise upgrade.refusal()


def host_header(server: Server) -> str:
    """Return the Host header of a WebSocket handshake."""
    host = f"[{server.host}]" if ":" in server.host else server.host
    usual = 443 if server.secure else 80
    return host if server.port == usual else f"{host}:{server.port}"


async def _open_tls(server: Server, context: ssl.SSLContext, tasks: Tasks) -> Transport:
    transport = SocketTransport(await _connect_tcp(server, tasks))
    try:
        return StreamTransport(await _wrap(_SocketStream(transport), server, context), transport)
    except BaseException:
        await transport.aclose()
        raise


_WITHOUT_TLS: Final = "if it does not use TLS, use mqtt://, ws:// or secure=False"


async def _wrap(stream: ByteStream, server: Server, context: ssl.SSLContext) -> TLSStream:
    try:
        # Brokers do not send TLS's close_notify, and MQTT has its own DISCONNECT.
        return await TLSStream.wrap(
            stream,
            hostname=server.host,
            ssl_context=context,
            standard_compatible=False,
        )
    except EndOfStream:
        raise EOFError(
            f"the peer closed the connection during the TLS handshake; {_WITHOUT_TLS}"
        ) from None
    except BrokenResourceError as exc:
        # Emitter resets a connection without TLS that begins with a TLS handshake.
        raise OSError(f"{_to_os_error(exc)} during the TLS handshake; {_WITHOUT_TLS}") from exc
    except ssl.SSLError as exc:
        explain(exc)
        raise


async def _connect_tcp(server: Server, tasks: Tasks) -> socket.socket:
    found = _alternate(await _look_up(server.host, server.port))
    if len(found) == 1:
        family, *_, address = found[0]
        sock = await _connect(family, address)
    else:
        sock = await _ConnectAttempts(tasks).run(found)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _alternate(found: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
    """Move the first address of another family to the second position (RFC 8305, section 4)."""
    other = next((entry for entry in found if entry[0] != found[0][0]), None)
    if other is None:
        return found
    return [found[0], other, *(entry for entry in found[1:] if entry is not other)]


class _ConnectAttempts:
    """
    Connects to the first address that accepts the connection.

    Each address is tried 0.25 seconds after the previous one, or as soon as that one has failed.

    :param tasks: runs the attempts. With another task group, cancelling would take one more turn;
        see :func:`is_cancelled`
    """

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._attempts: list[anyio.CancelScope] = []
        self._failures: list[OSError] = []
        self._connected: list[socket.socket] = []
        self._over = False
        self._changed = anyio.Event()

    async def run(self, found: Sequence[tuple[Any, ...]]) -> socket.socket:
        """Return the socket that is connected first."""
        winner = None
        try:
            for family, *_, address in found:
                if not (self._connected or self._tasks.abandoned()):
                    self._attempts.append(self._tasks.start_soon(self._attempt, family, address))
                    with anyio.move_on_after(_NEXT_ADDRESS_SECONDS):
                        await self._change()
            while not (self._is_decided or self._tasks.abandoned()):
                await self._change()
            winner = self._connected[0] if self._connected else None
        finally:
            self._over = True
            for attempt in self._attempts:
                attempt.cancel()
            # Two connections can be established in the same iteration of the event loop.
            for sock in self._connected:
                if sock is not winner:
                    sock.close()
        if winner is not None:
            return winner
        failures = self._failures or [OSError("cancelled")]
        reasons = "; ".join(dict.fromkeys(map(str, failures)))
        refused = any(isinstance(exc, ConnectionRefusedError) for exc in failures)
        raise (ConnectionRefusedError if refused else OSError)(reasons) from ExceptionGroup(
            "could not connect to any address", failures
        )

    @property
    def _is_decided(self) -> bool:
        return bool(self._connected) or len(self._failures) == len(self._attempts)

    async def _attempt(self, family: int, address: object) -> None:
        try:
            sock = await _connect(family, address)
        except OSError as exc:
            self._failures.append(exc)
        else:
            if self._over:
                # The cancellation of this attempt has come too late.
                sock.close()
            else:
                self._connected.append(sock)
        self._changed.set()

    async def _change(self) -> None:
        await self._changed.wait()
        self._changed = anyio.Event()


async def _look_up(host: str, port: int) -> Sequence[tuple[Any, ...]]:
    try:
        # Numeric addresses need no thread.
        return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        pass
    try:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as exc:
        raise OSError(f"invalid host name {host!r}: {exc}") from exc
    if not found:
        raise OSError(f"could not resolve {host!r}: the look-up returned no address")
    return found


async def _connect(family: int, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        code = sock.connect_ex(address)  # type: ignore[arg-type]  # what getaddrinfo() returned
        if code in _IN_PROGRESS and not _is_connected(sock):
            await anyio.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code and code not in _IN_PROGRESS:
            raise OSError(code, os.strerror(code))
    except BaseException:
        anyio.notify_closing(sock)
        sock.close()
        raise
    return sock


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _to_os_error(exc: BrokenResourceError) -> OSError:
    """Return an error with the message of the cause, because AnyIO's own error has no message."""
    return OSError(str(exc.__cause__ or "the connection broke"))
