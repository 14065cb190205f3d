"""HTTP and SOCKS5 proxies on loopback, which relay to a broker."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import anyio
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.buffered import BufferedByteStream

TARGET = "broker.example:443"
"""The only target that a proxy connects to, whose name the client cannot resolve."""


class Proxy(ABC):
    """
    A proxy.

    :param broker: the address to which it connects for :data:`TARGET`
    :param login: the required user name and password
    :ivar port: the port on loopback
    :ivar targets: the targets that clients have requested
    """

    def __init__(self, broker: tuple[str, int], login: tuple[str, str] | None = None) -> None:
        self.port = 0
        self.targets: list[str] = []
        self._broker = broker
        self._login = login

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator[None]:
        """Accept connections until the block ends."""
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
        self.port = listener.extra(SocketAttribute.local_port)
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, self._relay)
            yield
            tasks.cancel_scope.cancel()

    @abstractmethod
    async def accept(self, client: BufferedByteStream) -> bool:
        """Reply to the request of a client, and return whether to relay."""

    def _is_known(self, target: str) -> bool:
        self.targets.append(target)
        return target == TARGET

    async def _relay(self, connection: ByteStream) -> None:
        client = BufferedByteStream(connection)
        async with client:
            if await self.accept(client):
                async with (
                    await anyio.connect_tcp(*self._broker) as broker,
                    anyio.create_task_group() as tasks,
                ):
                    tasks.start_soon(self._copy, client, broker)
                    await self._copy(broker, client)
                    tasks.cancel_scope.cancel()

    async def _copy(self, source: ByteStream, target: ByteStream) -> None:
        with suppress(EndOfStream, BrokenResourceError, ClosedResourceError):
            while True:
                await target.send(await source.receive())
        with suppress(OSError, BrokenResourceError, ClosedResourceError):
            await target.send_eof()  # Trio raises OSError if the peer has reset the connection


class HTTPProxyServer(Proxy):
    """A proxy that supports CONNECT."""

    async def accept(self, client: BufferedByteStream) -> bool:
        head = await client.receive_until(b"\r\n\r\n", 4096)
        request, *lines = head.decode().split("\r\n")
        method, target, version = request.split()
        assert (method, version) == ("CONNECT", "HTTP/1.1")
        headers = dict(line.split(": ", 1) for line in lines)
        assert headers["Host"] == target
        if self._login is not None:
            login = base64.b64encode(":".join(self._login).encode()).decode()
            if headers.get("Proxy-Authorization") != f"Basic {login}":
                await client.send(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                return False
        if not self._is_known(target):
            await client.send(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return False
        await client.send(b"HTTP/1.1 200 Connection established\r\nVia: loopback\r\n\r\n")
        return True


class SOCKSProxyServer(Proxy):
    """A SOCKS5 proxy (RFC 1928 and 1929), which replies with its bound address of any kind."""

    bound = b"\x01\x7f\x00\x00\x01"

    async def accept(self, client: BufferedByteStream) -> bool:
        version, count = await client.receive_exactly(2)
        methods = await client.receive_exactly(count)
        assert version == 5
        method = 0 if self._login is None else 2
        if method not in methods:
            await client.send(b"\x05\xff")
            return False
        await client.send(bytes([5, method]))
        if self._login is not None:
            assert await client.receive_exactly(1) == b"\x01"
            login = await self._text(client), await self._text(client)
            await client.send(b"\x01\x00" if login == self._login else b"\x01\x01")
            if login != self._login:
                return False
        assert await client.receive_exactly(4) == b"\x05\x01\x00\x03"
        host = await self._text(client)
        port = int.from_bytes(await client.receive_exactly(2), "big")
        error = 0 if self._is_known(f"{host}:{port}") else 4
        await client.send(bytes([5, error, 0]) + self.bound + b"\x12\x34")
        return not error

    async def _text(self, client: BufferedByteStream) -> str:
        return (await client.receive_exactly((await client.receive_exactly(1))[0])).decode()


class ClosingProxyServer(Proxy):
    """A proxy that closes each connection in the middle of its first reply."""

    async def accept(self, client: BufferedByteStream) -> bool:
        await client.receive()
        await client.send(b"\x05")
        return False
