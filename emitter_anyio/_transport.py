"""Bytes to and from a broker, behind one small interface.

A transport is used by one reader and one writer. Sending never waits in the caller of a verb:
:meth:`Transport.try_send` hands over what the link takes at once, and the writer task does the
rest by :meth:`Transport.send`. A cancelled send that waits inside a stream may have handed over a
part of a packet, so nobody but the writer, which is cancelled only when the link ends, waits there.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Final

import anyio
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream, to_thread
from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream

from ._options import Options, Server

_CHUNK: Final = 65536

# Not EAGAIN: a Unix socket whose queue is full says so, and nothing is under way then.
_UNDER_WAY: Final = {errno.EINPROGRESS, getattr(errno, "WSAEWOULDBLOCK", errno.EINPROGRESS)}

BROKEN: Final = (OSError, BrokenResourceError, ClosedResourceError, EndOfStream)
"""What a transport raises when the link is broken."""


class Transport(ABC):
    """A way to a broker."""

    tears: bool
    """Whether a :meth:`send` that fails or is cancelled may have handed over a part."""

    @abstractmethod
    async def receive(self) -> bytes:
        """
        Wait for bytes from the peer.

        :return: some bytes; none when the peer has closed its side
        """

    @abstractmethod
    def try_send(self, data: bytes) -> int:
        """Hand over what the link takes without waiting, and return how many bytes that is."""

    @abstractmethod
    async def send(self, data: bytes) -> int:
        """Wait until the link takes some bytes, and return how many bytes it took."""

    @abstractmethod
    async def send_eof(self) -> None:
        """Tell the peer, where the link can, that nothing more comes; it may still send."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close at once; safe under cancellation, and to be called twice."""


class SocketTransport(Transport):
    """A non-blocking socket of our own: TCP, or a Unix socket."""

    tears = False

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def receive(self) -> bytes:
        while True:
            await anyio.wait_readable(self._sock)
            try:
                return self._sock.recv(_CHUNK)
            except (BlockingIOError, InterruptedError):
                continue

    def try_send(self, data: bytes) -> int:
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0

    async def send(self, data: bytes) -> int:
        while not (sent := self.try_send(data)):
            await anyio.wait_writable(self._sock)
        return sent

    async def send_eof(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        if self._sock.fileno() >= 0:
            # Those who wait for the socket must know before its number is given to another one.
            anyio.notify_closing(self._sock)
            self._sock.close()


class StreamTransport(Transport):
    """An AnyIO byte stream: TLS, or whatever a ``connectable`` gives."""

    tears = True

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    async def receive(self) -> bytes:
        try:
            return await self._stream.receive(_CHUNK)
        except EndOfStream:
            return b""
        except BrokenResourceError as exc:
            raise _worded(exc) from exc

    def try_send(self, data: bytes) -> int:
        return 0

    async def send(self, data: bytes) -> int:
        try:
            await self._stream.send(data)
        except BrokenResourceError as exc:
            raise _worded(exc) from exc
        return len(data)

    async def send_eof(self) -> None:
        # TLS cannot, and says so with a NotImplementedError, or with a TypeError when it is broken.
        with suppress(NotImplementedError, TypeError, *BROKEN):
            await self._stream.send_eof()

    async def aclose(self) -> None:
        await anyio.aclose_forcefully(self._stream)


class _SocketStream(ByteStream):
    """A socket of our own as the byte stream that AnyIO's TLS wants below it."""

    def __init__(self, transport: SocketTransport) -> None:
        self._transport = transport
        self._sending = anyio.Lock(fast_acquire=True)

    async def receive(self, max_bytes: int = _CHUNK) -> bytes:
        if data := await self._transport.receive():
            return data
        raise EndOfStream

    async def send(self, item: bytes) -> None:
        # The reader sends too, when the peer renews its keys.
        async with self._sending:
            while item:
                item = item[await self._transport.send(item) :]

    async def send_eof(self) -> None:
        raise NotImplementedError("TLS has an end of its own")

    async def aclose(self) -> None:
        await self._transport.aclose()


async def open_transport(server: Server, options: Options) -> Transport:
    """
    Open a way to a server; cancelling leaves no socket behind.

    :raises OSError: if it cannot be reached
    :raises ssl.SSLError: if TLS does not come about
    """
    if options.connectable is not None:
        return StreamTransport(await options.connectable.connect())
    if server.scheme == "unix":
        if sys.platform == "win32":  # pragma: no cover - not on Linux
            raise OSError("Python has no Unix sockets on Windows")
        return SocketTransport(await _connect(socket.AF_UNIX, server.host))
    if server.scheme == "mqtts":
        return await _open_tls(server, options.ssl_context)
    return SocketTransport(await _connect_tcp(server))


async def _open_tls(server: Server, context: ssl.SSLContext | None) -> Transport:
    if context is None:
        # Reading the system's authorities takes long enough to hold up the loop.
        context = await to_thread.run_sync(ssl.create_default_context)
    transport = SocketTransport(await _connect_tcp(server))
    try:
        # Emitter's clients close without the closing message of TLS, and MQTT has an end of its
        # own, so nothing is to be learned from waiting for it.
        stream = await TLSStream.wrap(
            _SocketStream(transport),
            hostname=server.host,
            ssl_context=context,
            standard_compatible=False,
        )
    except BaseException as exc:
        await transport.aclose()
        if isinstance(exc, EndOfStream):
            raise EOFError("the peer closed the link in the TLS handshake") from None
        if isinstance(exc, BrokenResourceError):
            raise _worded(exc) from exc
        raise
    return StreamTransport(stream)


async def _connect_tcp(server: Server) -> socket.socket:
    try:
        found = await anyio.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except UnicodeError as exc:
        raise OSError(f"{server.host!r} is no host name: {exc}") from exc
    failures = []
    deadline = anyio.current_effective_deadline()
    for number, (family, *_, address) in enumerate(found):
        # An address that swallows packets must leave time for those behind it.
        share = (deadline - anyio.current_time()) / (len(found) - number)
        try:
            with anyio.fail_after(share):
                sock = await _connect(family, address)
        except OSError as exc:
            failures.append(exc)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
    if len(failures) == 1:
        raise failures[0]
    reasons = "; ".join(dict.fromkeys(str(exc) or "timed out" for exc in failures))
    refused = any(isinstance(exc, ConnectionRefusedError) for exc in failures)
    raise (ConnectionRefusedError if refused else OSError)(reasons) from ExceptionGroup(
        "no address could be reached", failures
    )


async def _connect(family: int, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        code = sock.connect_ex(address)  # type: ignore[arg-type]  # what getaddrinfo() gave
        if code in _UNDER_WAY:
            await anyio.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        anyio.notify_closing(sock)
        sock.close()
        raise
    return sock


def _worded(exc: BrokenResourceError) -> OSError:
    """AnyIO's error says nothing; its cause may."""
    return OSError(str(exc.__cause__ or "the stream is broken"))
