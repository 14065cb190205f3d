"""Helpers for the client suite."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import anyio
from anyio.abc import (
    ByteReceiveStream,
    ByteSendStream,
    ByteStream,
    Listener,
    SocketAttribute,
    SocketStream,
    TaskGroup,
)
from anyio.lowlevel import checkpoint

from emitter_anyio import Emitter, EmitterMessage, EventStream
from tests.support.server import Server


class Calls:
    """A handler that records its calls and lets a test wait for them."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._called = anyio.Event()

    def __call__(self, value: Any = None) -> None:
        self.values.append(value)
        self._called.set()

    async def get(self, count: int) -> list[Any]:
        """Wait for ``count`` calls, and return the values of all calls so far."""
        while len(self.values) < count:
            self._called = anyio.Event()
            await self._called.wait()
        return self.values


class Keys:
    """
    A key function that counts its calls.

    :param keys: the keys to return in turn, repeating the last one; an exception is raised instead
    """

    def __init__(self, *keys: str | Exception) -> None:
        self.calls = 0
        self._keys = list(keys)

    async def __call__(self) -> str:
        await checkpoint()
        self.calls += 1
        key = self._keys.pop(0) if len(self._keys) > 1 else self._keys[0]
        if isinstance(key, Exception):
            raise key
        return key


def texts(messages: Iterable[EmitterMessage]) -> list[str]:
    return [message.as_string() for message in messages]


async def arrived(emitter: Emitter, stream: EventStream[EmitterMessage]) -> list[str]:
    """Return everything in a stream, after a flush() that waits for messages in transit."""
    await emitter.flush()
    found = []
    with suppress(anyio.WouldBlock, anyio.EndOfStream):
        while True:
            found.append(stream.receive_nowait())
    return texts(found)


async def checkpoints(count: int = 5) -> None:
    """Let the other tasks run, ``count`` times."""
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


async def enter(manager: AbstractAsyncContextManager[object]) -> None:
    async with manager:
        pass


class Relay:
    """A proxy in front of the broker that records the client's bytes and can cut connections."""

    def __init__(self, server: Server) -> None:
        self.port = 0
        self.sent = bytearray()
        self._server = server
        self._scopes: list[anyio.CancelScope] = []

    def cut(self) -> None:
        """Cut the open connections. Later ones are relayed again."""
        for scope in self._scopes:
            scope.cancel()

    def packets(self) -> list[int]:
        """Return the types of the MQTT packets that the client has sent."""
        kinds = []
        at = 0
        while at < len(self.sent):
            kinds.append(self.sent[at] >> 4)
            length = shift = 0
            while True:
                at += 1
                length |= (self.sent[at] & 0x7F) << shift
                shift += 7
                if not self.sent[at] & 0x80:
                    break
            at += 1 + length
        return kinds

    async def serve(self, client: ByteStream) -> None:
        server = self._server
        with anyio.CancelScope() as scope:
            self._scopes.append(scope)
            async with client, await _open(server) as broker, anyio.create_task_group() as tasks:
                tasks.start_soon(self._pump, tasks, broker, client)
                tasks.start_soon(self._pump, tasks, client, broker, self.sent)

    async def _pump(
        self,
        tasks: TaskGroup,
        source: ByteReceiveStream,
        sink: ByteSendStream,
        record: bytearray | None = None,
    ) -> None:
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                data = await source.receive()
                if record is not None:
                    record += data
                await sink.send(data)
        tasks.cancel_scope.cancel()


async def _open(server: Server) -> ByteStream:
    return await anyio.as_connectable((server.host, server.port), tls=server.secure).connect()


@asynccontextmanager
async def relay(server: Server, path: str | None = None) -> AsyncGenerator[Relay]:
    """Relay from a port on loopback, or from a Unix socket at ``path``."""
    proxy = Relay(server)
    listener: Listener[SocketStream]
    if path is None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        proxy.port = listener.extra(SocketAttribute.local_port)
    else:
        listener = await anyio.create_unix_listener(path)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, proxy.serve)
        try:
            yield proxy
        finally:
            tasks.cancel_scope.cancel()
