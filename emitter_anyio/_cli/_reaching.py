"""The doctor's way to the broker, step by step: name, TCP, TLS, WebSocket, CONNACK."""

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

from ._findings import Report
from ._source import Source

_SOON: Final = 14 * 86400
"""A certificate that ends sooner, in seconds, is worth a note."""

_CERTIFICATE: Final = {
    9: "it is not valid yet: one of the two clocks is wrong",
    10: "have the broker's certificate renewed; or this machine's clock is wrong",
    62: "connect to a name that is in the certificate",
    64: "connect to a name that is in the certificate: this address is not",
}
"""What can be done, by OpenSSL's code."""

_CLOSED: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
"""As some versions of OpenSSL tell it."""

_PORTS: Final = (
    "is the broker running? Emitter listens on 8080, and on 443 with TLS, unless it is told "
    "otherwise"
)


class _Heard(ByteStream):
    """A stream that keeps how what comes begins."""

    def __init__(self, below: ByteStream) -> None:
        self._below = below
        self.head = b""

    async def receive(self, max_bytes: int = 65536) -> bytes:
        data = await self._below.receive(max_bytes)
        self.head = self.head or data[:16]
        return data

    async def send(self, item: bytes) -> None:
        await self._below.send(item)

    async def send_eof(self) -> None:
        await self._below.send_eof()

    async def aclose(self) -> None:
        await self._below.aclose()


class _Open(ByteStreamConnectable):
    """What is connected already."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    async def connect(self) -> ByteStream:
        return self._stream


@asynccontextmanager
async def reach(source: Source, report: Report, timeout: float) -> AsyncGenerator[Emitter | None]:
    """
    Go to the broker, and report each step.

    :param timeout: for each step, in seconds
    :return: a client, or ``None`` if a step failed
    """
    server = make_options(source.url, source.options).servers[0]
    async with AsyncExitStack() as stack:
        stream = await _stream_to(server, source, report, timeout, stack)
        if stream is None:
            yield None
            return
        heard = _Heard(stream)
        options = {**source.options, "connectable": _Open(heard), "reconnect": None}
        options.pop("ssl_context", None)
        url = _without_tls(source.url, server)
        emitter = connect(url, connect_timeout=timeout, request_timeout=timeout, **options)
        start = time.perf_counter()
        try:
            await stack.enter_async_context(emitter)
        except ConnectError as exc:
            _report_refusal(server, exc, heard.head, report, timeout)
            yield None
        else:
            if server.websocket:
                report.add("websocket", "ok", f"the handshake is done, at {server.path}")
            took = f"{(time.perf_counter() - start) * 1e3:.1f} ms"
            report.add("connack", "ok", f"the broker has accepted us, in {took}")
            yield emitter


def _without_tls(url: str, server: Server) -> str:
    """Return a URL for a stream that speaks TLS already."""
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
            report.add("socket", "wrong", f"{server.host}: {exc.strerror or exc}", _PORTS)
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
        report.add("tls", "wrong", *_tls_trouble(exc, timeout))
        return None


async def _look_up(server: Server, report: Report, timeout: float) -> list[str]:
    start = time.perf_counter()
    try:
        with anyio.fail_after(timeout):
            found = await anyio.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        words = getattr(exc, "strerror", None) or str(exc) or f"no answer within {timeout:g} s"
        report.add(
            "dns", "wrong", f"{server.host}: {words}", "check the name, and this machine's resolver"
        )
        return []
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
    if addresses == [server.host]:
        report.add("dns", "ok", f"{server.host} is an address")
    else:
        took = f"{(time.perf_counter() - start) * 1e3:.1f} ms"
        report.add("dns", "ok", f"{server.host} is {', '.join(addresses)}, in {took}")
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
            way = "a firewall may swallow what is sent there; is the address the right one?"
            report.add("tcp", "wrong", f"{where}: no answer within {timeout:g} s", way)
        except OSError as exc:
            cause = exc.__cause__ if isinstance(exc.__cause__, OSError) else exc
            # asyncio has words of its own.
            words = os.strerror(cause.errno) if cause.errno else str(cause)
            report.add("tcp", "wrong", f"{where}: {words}", _PORTS)
        else:
            took = f"{(time.perf_counter() - start) * 1e3:.1f} ms"
            report.add("tcp", "ok", f"connected to {where} in {took}")
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
    text = (
        f"{version}, and a certificate for {server.host} that is good for {left / 86400:.0f} days"
    )
    if left < _SOON:
        report.add("tls", "note", text, "have it renewed")
    else:
        report.add("tls", "ok", text)
    return secured


def _tls_trouble(exc: Exception, timeout: float) -> tuple[str, str]:
    if isinstance(exc, ssl.SSLCertVerificationError):
        way = _CERTIFICATE.get(
            exc.verify_code, "if its authority is one of your own, --cafile FILE trusts it"
        )
        return f"the broker's certificate is not trusted: {exc.verify_message}", way
    if isinstance(exc, ssl.SSLError) and not isinstance(exc, _CLOSED):
        words = str(exc.reason or exc).replace("_", " ").lower()
        return words, "does the port speak TLS? mqtt:// and ws:// go without"
    if isinstance(exc, TimeoutError):
        return f"no answer within {timeout:g} s", "does the port speak TLS?"
    return "the peer closed the link in the handshake", "does the port speak TLS?"


def _report_refusal(
    server: Server, exc: ConnectError, head: bytes, report: Report, timeout: float
) -> None:
    upgraded = head.startswith(b"HTTP/1.1 101")
    check = "connack"
    if server.websocket:
        if upgraded:
            report.add("websocket", "ok", f"the handshake is done, at {server.path}")
        else:
            check = "websocket"
    cause = list(exc.causes.values())[-1]
    words = str(cause) or f"no answer within {timeout:g} s"
    if isinstance(exc, ConnectRefusedError):
        way = "user and password go into the URL: mqtt://NAME:PASSWORD@HOST" if exc.code > 3 else ""
    elif check == "websocket":
        way = "is the path the right one? A proxy may take another; or try mqtt:// or mqtts://"
    elif isinstance(cause, RemoteProtocolError):
        way = "something else than a broker listens there"
    else:
        way = "does a broker listen there, and without TLS? mqtts:// and wss:// speak it"
    report.add(check, "wrong", words, way)
