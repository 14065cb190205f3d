"""An ASGI application in the same event loop as its test, without a server or a socket."""

from __future__ import annotations

import json
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    MutableMapping,
    Sequence,
)
from contextlib import asynccontextmanager
from typing import Any, TypeAlias
from urllib.parse import quote

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

Event: TypeAlias = MutableMapping[str, Any]
Application: TypeAlias = Callable[
    [Event, Callable[[], Awaitable[Event]], Callable[[Event], Awaitable[None]]],
    Coroutine[Any, Any, None],
]


class Exchange:
    """What the test and the application say to each other."""

    def __init__(
        self, send: MemoryObjectSendStream[Event], receive: MemoryObjectReceiveStream[Event]
    ) -> None:
        self._send = send
        self._receive = receive

    async def say(self, type: str, **event: Any) -> None:
        await self._send.send({"type": type, **event})

    async def hear(self, type: str) -> Event:
        event = await self._receive.receive()
        assert event["type"] == type, event
        return event

    async def say_text(self, text: str) -> None:
        await self.say("websocket.receive", text=text)

    async def hear_json(self, wanted: Callable[[Any], bool]) -> Any:
        """Give the first text that is wanted; the others are passed over."""
        while not wanted(heard := json.loads((await self.hear("websocket.send"))["text"])):
            pass
        return heard


@asynccontextmanager
async def _calling(app: Application, scope: Event) -> AsyncIterator[Exchange]:
    send, for_app = anyio.create_memory_object_stream[Event](100)
    of_app, receive = anyio.create_memory_object_stream[Event](100)
    with send, for_app, of_app, receive:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app, scope, for_app.receive, of_app.send)
            yield Exchange(send, receive)


@asynccontextmanager
async def serving(app: Application) -> AsyncIterator[None]:
    """Run the application's lifespan."""
    async with _calling(app, {"type": "lifespan", "asgi": {"version": "3.0"}}) as exchange:
        await exchange.say("lifespan.startup")
        await exchange.hear("lifespan.startup.complete")
        yield
        await exchange.say("lifespan.shutdown")
        await exchange.hear("lifespan.shutdown.complete")


@asynccontextmanager
async def websocket(
    app: Application,
    path: str,
    *,
    headers: Sequence[tuple[bytes, bytes]] = (),
    answer: str = "websocket.accept",
    **query: str,
) -> AsyncIterator[Exchange]:
    """
    Be a browser with a WebSocket.

    :param headers: those of the handshake
    :param answer: how the application answers it
    """
    text = "&".join(f"{name}={quote(value)}" for name, value in query.items())
    scope = {
        "type": "websocket",
        "asgi": {"version": "3.0"},
        "path": path,
        "query_string": text.encode(),
        "headers": [*headers],
    }
    async with _calling(app, scope) as exchange:
        await exchange.say("websocket.connect")
        await exchange.hear(answer)
        yield exchange
        await exchange.say("websocket.disconnect", code=1001)


async def post(app: Application, path: str, body: bytes = b"", **query: str) -> int:
    """Send a request by HTTP, and return the status of the response."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "method": "POST",
        "path": path,
        "query_string": "&".join(
            f"{name}={quote(value)}" for name, value in query.items()
        ).encode(),
        "headers": [],
    }
    async with _calling(app, scope) as exchange:
        await exchange.say("http.request", body=body)
        status = int((await exchange.hear("http.response.start"))["status"])
        await exchange.hear("http.response.body")
    return status
