"""Run an ASGI application in the event loop of its test, without a server or a socket."""

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


class AsgiConnection:
    """One call of the application: the events that the test sends to it and receives from it."""

    def __init__(
        self, send: MemoryObjectSendStream[Event], receive: MemoryObjectReceiveStream[Event]
    ) -> None:
        self._send = send
        self._receive = receive

    async def send(self, type: str, **event: Any) -> None:
        await self._send.send({"type": type, **event})

    async def receive(self, type: str) -> Event:
        event = await self._receive.receive()
        assert event["type"] == type, event
        return event

    async def send_text(self, text: str) -> None:
        await self.send("websocket.receive", text=text)

    async def receive_json(self, wanted: Callable[[Any], bool]) -> Any:
        """Return the first JSON message that is ``wanted``, and discard those before it."""
        while not wanted(message := json.loads((await self.receive("websocket.send"))["text"])):
            pass
        return message


@asynccontextmanager
async def _calling(app: Application, scope: Event) -> AsyncIterator[AsgiConnection]:
    send, app_receive = anyio.create_memory_object_stream[Event](100)
    app_send, receive = anyio.create_memory_object_stream[Event](100)
    with send, app_receive, app_send, receive:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app, scope, app_receive.receive, app_send.send)
            yield AsgiConnection(send, receive)


@asynccontextmanager
async def lifespan(app: Application) -> AsyncIterator[None]:
    """Run the application's lifespan."""
    async with _calling(app, {"type": "lifespan", "asgi": {"version": "3.0"}}) as connection:
        await connection.send("lifespan.startup")
        await connection.receive("lifespan.startup.complete")
        yield
        await connection.send("lifespan.shutdown")
        await connection.receive("lifespan.shutdown.complete")


@asynccontextmanager
async def websocket(
    app: Application,
    path: str,
    *,
    headers: Sequence[tuple[bytes, bytes]] = (),
    answer: str = "websocket.accept",
    **query: str,
) -> AsyncIterator[AsgiConnection]:
    """
    Open a WebSocket to the application, as a browser does.

    :param headers: HTTP headers of the handshake
    :param answer: the event with which the application answers the handshake
    :param query: parameters of the query string
    """
    text = "&".join(f"{name}={quote(value)}" for name, value in query.items())
    scope = {
        "type": "websocket",
        "asgi": {"version": "3.0"},
        "path": path,
        "query_string": text.encode(),
        "headers": [*headers],
    }
    async with _calling(app, scope) as connection:
        await connection.send("websocket.connect")
        await connection.receive(answer)
        yield connection
        await connection.send("websocket.disconnect", code=1001)


async def post(app: Application, path: str, body: bytes = b"", **query: str) -> int:
    """Send a POST request, and return the status of the response."""
    status, _ = await request(app, "POST", path, body, **query)
    return status


async def request(
    app: Application, method: str, path: str, body: bytes = b"", **query: str
) -> tuple[int, str]:
    """Send a request by HTTP, and return the status and the body of the response."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "method": method,
        "path": path,
        "query_string": "&".join(
            f"{name}={quote(value)}" for name, value in query.items()
        ).encode(),
        "headers": [],
    }
    async with _calling(app, scope) as connection:
        await connection.send("http.request", body=body)
        status = int((await connection.receive("http.response.start"))["status"])
        content = (await connection.receive("http.response.body"))["body"]
    return status, content.decode()
