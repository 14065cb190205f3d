"""
Litestar's channels on Emitter: what one server publishes reaches the WebSockets of all servers.

    python -m pip install . litestar uvicorn websockets
    python -m uvicorn examples.litestar_channels:app

In a second terminal, ``python -m websockets ws://127.0.0.1:8000/live/news`` shows the last ten
messages, and then new ones. ``curl -d hello http://127.0.0.1:8000/publish/news`` publishes one. To
use your own broker, set EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET. Stop with Ctrl-C.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypeAlias
from urllib.parse import quote, unquote

from litestar import Litestar, Request, post
from litestar.channels import ChannelsPlugin
from litestar.channels.backends.base import ChannelsBackend
from litestar.params import FromPath

from emitter_anyio import ChannelKey, Emitter, EmitterMessage, EventStream, connect
from emitter_anyio.testing import ConfiguredBroker

PREFIX = "litestar/"
Opening: TypeAlias = Callable[[], AbstractAsyncContextManager[tuple[Emitter, ChannelKey]]]


def to_emitter(name: str) -> str:
    """Return the channel for a name, as one level: Emitter permits only some characters."""
    return f"{PREFIX}{quote(name, safe='').replace('~', '%7E').replace('%', '$')}/"


def from_emitter(channel: str) -> str:
    return unquote(channel.removeprefix(PREFIX).removesuffix("/").replace("$", "%"))


class EmitterChannelsBackend(ChannelsBackend):
    """
    A backend that publishes through Emitter, which keeps the history too.

    :param opening: opens a client, and returns it with a key for all channels below ``PREFIX``
    :param ttl: how many seconds messages stay in the history
    """

    def __init__(self, opening: Opening, ttl: int = 86400) -> None:
        self._opening, self._ttl = opening, ttl
        self._stack = AsyncExitStack()
        self._emitter: Emitter
        self._key: ChannelKey
        self._messages: EventStream[EmitterMessage]

    async def on_startup(self) -> None:
        self._emitter, self._key = await self._stack.enter_async_context(self._opening())
        # Litestar hands over each message without waiting, and drops messages for slow browsers
        # itself, so "block" never delays the client for long.
        stream = self._emitter.stream("message", overflow="block")
        self._messages = await self._stack.enter_async_context(stream)

    async def on_shutdown(self) -> None:
        await self._stack.aclose()

    async def publish(self, data: bytes, channels: Iterable[str]) -> None:
        for name in channels:
            # With QoS 1, Litestar would wait for the broker before it publishes the next message.
            await self._emitter.publish(self._key, to_emitter(name), data, ttl=self._ttl)

    async def subscribe(self, channels: Iterable[str]) -> None:
        for name in channels:
            await self._emitter.subscribe(self._key, to_emitter(name), last=0)

    async def unsubscribe(self, channels: Iterable[str]) -> None:
        for name in channels:
            await self._emitter.unsubscribe(self._key, to_emitter(name))

    async def stream_events(self) -> AsyncGenerator[tuple[str, bytes], None]:
        async for message in self._messages:
            yield from_emitter(message.channel), message.binary

    async def get_history(self, channel: str, limit: int | None = None) -> list[bytes]:
        stored = self._emitter.history(self._key, to_emitter(channel), limit or 2**31 - 1)
        return [message.binary async for message in stored]


@asynccontextmanager
async def open_client() -> AsyncIterator[tuple[Emitter, ChannelKey]]:
    async with ConfiguredBroker() as broker, connect(broker.url) as emitter:
        yield emitter, await emitter.keygen(broker.secret_key, f"{PREFIX}#/", "rwsl")


channels = ChannelsPlugin(
    EmitterChannelsBackend(open_client),
    channels=["news", "sport"],
    create_ws_route_handlers=True,
    ws_handler_base_path="/live",
    ws_handler_send_history=10,
)


@post("/publish/{name:str}", status_code=204)
async def publish(name: FromPath[str], request: Request[Any, Any, Any]) -> None:
    await channels.wait_published(await request.body(), name)


# Litestar's own logging configuration would replace that of the program.
app = Litestar([publish], plugins=[channels], logging_config=None)
