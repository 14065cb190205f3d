"""The checks of ``doctor`` while it connects: DNS, TCP, TLS, WebSocket and CONNACK."""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import anyio
from anyio import BrokenResourceError, EndOfStream
from anyio.abc import ByteStream, ByteStreamConnectable
from anyio.streams.tls import TLSAttribute, TLSStream

from emitter_anyio import ConnectError, ConnectRefusedError, Emitter, RemoteProtocolError, connect
from emitter_anyio._net.options import Server, make_options
from emitter_anyio._net.tls import client_context

from ._report import Report
from ._source import Source

_EXPIRY_NOTE_SECONDS: Final = 14 * 86400
"""The remaining lifetime below which a certificate gets a note."""

_CERTIFICATE_FIXES: Final = {
    9: "the certificate is not valid yet: check the clocks of both machines",
    10: "renew the broker's certificate, or check the clock of this machine",
    62: "connect to a host name in the certificate",
    64: "connect to a host name in the certificate instead of an address",
}
"""What the user can do, by OpenSSL's error code."""

_TLS_CLOSED: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
"""The errors that some versions of OpenSSL raise when the peer closes the connection."""

_PORT_FIX: Final = (
    "check that the broker is running; Emitter's default ports are 8080, and 443 with TLS"
)


class _RecordingStream(ByteStream):
    """
    A stream that records the first bytes it receives.

    :ivar head: these bytes
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self.head = b""

    async def receive(self, max_bytes: int = 65536) -> bytes:
        data = await self._stream.receive(max_bytes)
        self.head = self.head or data[:16]
        return data

    async def send(self, item: bytes) -> None:
        await self._stream.send(item)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Connected(ByteStreamConnectable):
    """A connectable that returns a stream that is already connected."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    async def connect(self) -> ByteStream:
        return self._stream


@asynccontextmanager
async def check_connection(
    source: Source, report: Report, timeout: float
) -> AsyncGenerator[Emitter | None]:
    """
    Connect to the broker and report each step.

    :param timeout: the timeout of each step in seconds
    :return: a connected client, or ``None`` if a step failed
    """
    server = make_options(source.url, source.options).servers[0]
    async with AsyncExitStack() as stack:
        stream = await _stream_to(server, source, report, timeout, stack)
        if stream is None:
            yield None
            return
        recording = _RecordingStream(stream)
        options = {**source.options, "connectable": _Connected(recording), "reconnect": None}
        options.pop("ssl_context", None)
        url = _without_tls(source.url, server)
        emitter = connect(url, connect_timeout=timeout, request_timeout=timeout, **options)
        start = time.perf_counter()
        try:
            await stack.enter_async_context(emitter)
        except ConnectError as exc:
            _report_failure(server, exc, recording.head, report, timeout)
            yield None
        else:
            if server.websocket:
                report.add("websocket", "ok", f"handshake completed at {server.shown_path}")
            report.add("connack", "ok", f"connection accepted in {_elapsed(start)}")
            yield emitter


def _elapsed(start: float) -> str:
    return f"{(time.perf_counter() - start) * 1e3:.1f} ms"


def _without_tls(url: str, server: Server) -> str:
    """Return a URL for a stream that is already encrypted."""
    if not server.secure:
        return url
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    host = f"[{server.host}]" if ":" in server.host else server.host
    scheme = parts.scheme.removesuffix("s")
    return urlunsplit((scheme, f"{user}{at}{host}:{server.port}", parts.path, parts.query, ""))


async def _stream_to(
    server: Server, source: Source, report: Report, timeout: float, stack: AsyncExitStack
) -> ByteStream | None:
    if server.scheme == "unix":
        try:
            unix = await anyio.connect_unix(server.host)
        except OSError as exc:
            report.add("socket", "failed", f"{server.host}: {exc.strerror or exc}", _PORT_FIX)
            return None
        stack.push_async_callback(anyio.aclose_forcefully, unix)
        report.add("socket", "ok", f"connected to {server.host}")
        return unix
    addresses = await _look_up(server, report, timeout)
    stream = await _connect(server, addresses, report, timeout) if addresses else None
    if stream is None:
        return None
    stack.push_async_callback(anyio.aclose_forcefully, stream)
    if not server.secure:
        return stream
    try:
        with anyio.fail_after(timeout):
            return await _secure(stream, server, source.context, report)
    except (OSError, EndOfStream, BrokenResourceError) as exc:
        report.add("tls", "failed", *_describe_tls_error(exc, timeout))
        return None


async def _look_up(server: Server, report: Report, timeout: float) -> list[str]:
    start = time.perf_counter()
    try:
        with anyio.fail_after(timeout):
            found = await anyio.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc) or f"no reply within {timeout:g} s"
        fix = "check the name and the DNS resolver of this machine"
        report.add("dns", "failed", f"{server.host}: {reason}", fix)
        return []
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
    if addresses == [server.host]:
        report.add("dns", "ok", f"{server.host} is an IP address")
    else:
        text = f"{server.host} resolved to {', '.join(addresses)} in {_elapsed(start)}"
        report.add("dns", "ok", text)
    return addresses


async def _connect(
    server: Server, addresses: list[str], report: Report, timeout: float
) -> ByteStream | None:
    for address in addresses:
        where = f"{address} port {server.port}"
        start = time.perf_counter()
        try:
            with anyio.fail_after(timeout):
                stream = await anyio.connect_tcp(address, server.port)
        except TimeoutError:
            fix = "check the address, and whether a firewall drops the packets"
            report.add("tcp", "failed", f"{where}: no reply within {timeout:g} s", fix)
        except OSError as exc:
            cause = exc.__cause__ if isinstance(exc.__cause__, OSError) else exc
            # asyncio's own text differs from Trio's.
            reason = os.strerror(cause.errno) if cause.errno else str(cause)
            report.add("tcp", "failed", f"{where}: {reason}", _PORT_FIX)
        else:
            report.add("tcp", "ok", f"connected to {where} in {_elapsed(start)}")
            return stream
    return None


async def _secure(
    stream: ByteStream, server: Server, given: ssl.SSLContext | None, report: Report
) -> ByteStream:
    secured = await TLSStream.wrap(
        stream,
        hostname=server.host,
        ssl_context=await client_context(given),
        standard_compatible=False,
    )
    certificate: Any = secured.extra(TLSAttribute.peer_certificate)
    left = ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()
    version = secured.extra(TLSAttribute.tls_version)
    text = f"{version}, certificate for {server.host} valid for {left / 86400:.0f} days"
    if left < _EXPIRY_NOTE_SECONDS:
        report.add("tls", "note", text, "renew the broker's certificate soon")
    else:
        report.add("tls", "ok", text)
    return secured


def _describe_tls_error(exc: Exception, timeout: float) -> tuple[str, str]:
    """Return a description of the error, and a fix."""
    fix = "use an mqtt:// or ws:// URL if the port does not use TLS"
    if isinstance(exc, ssl.SSLCertVerificationError):
        fix = _CERTIFICATE_FIXES.get(
            exc.verify_code, "use --cafile FILE to trust a private certificate authority"
        )
        return f"the broker's certificate is not trusted: {exc.verify_message}", fix
    if isinstance(exc, ssl.SSLError) and not isinstance(exc, _TLS_CLOSED):
        return str(exc.reason or exc).replace("_", " ").lower(), fix
    if isinstance(exc, TimeoutError):
        return f"no reply within {timeout:g} s", fix
    return "the peer closed the connection during the handshake", fix


def _report_failure(
    server: Server, exc: ConnectError, head: bytes, report: Report, timeout: float
) -> None:
    upgraded = head.startswith(b"HTTP/1.1 101")
    check = "connack"
    if server.websocket:
        if upgraded:
            report.add("websocket", "ok", f"handshake completed at {server.shown_path}")
        else:
            check = "websocket"
    cause = list(exc.causes.values())[-1]
    reason = str(cause) or f"no reply within {timeout:g} s"
    if isinstance(exc, ConnectRefusedError):
        fix = "use --username and --password-file, with the right password" if exc.code > 3 else ""
    elif check == "websocket":
        fix = "check the path, which a proxy might require, or use mqtt:// or mqtts://"
    elif isinstance(cause, RemoteProtocolError):
        fix = "check the port: the server there is not an MQTT broker"
    elif server.secure:
        fix = "check the port, or use --client-cert FILE if the broker requires a certificate"
    else:
        fix = "check that the port is the broker's, or use mqtts:// or wss:// if it requires TLS"
    report.add(check, "failed", reason, fix)
