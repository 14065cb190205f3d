"""
A chat in the browser: one Emitter client for the server, and a WebSocket for each browser.

    python -m pip install . starlette uvicorn websockets
    python -m uvicorn examples.web_chat.app:app    # open http://127.0.0.1:8000 in two windows

The server starts a development broker. To use an existing broker instead, set EMITTER_URL
(mqtt://HOST:PORT) and EMITTER_SECRET. Several servers with the same broker form one chat.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from emitter_anyio import ChannelKey, Emitter, EmitterError, connect
from emitter_anyio.testing import ConfiguredBroker

from .people import People

CHANNEL = "webchat/room/"


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    server = People.new_server()
    async with ConfiguredBroker() as broker, connect(broker.url, username=server) as emitter:
        key = await emitter.keygen(broker.secret_key, "webchat/#/", "rwslp")
        people = People(server, emitter, key)
        emitter.on("connect", people.notify)
        emitter.on("disconnect", people.notify)
        app.state.emitter, app.state.key, app.state.people = emitter, key, people
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(people.run)
            yield
            tasks.cancel_scope.cancel()


def same_origin(websocket: WebSocket) -> bool:
    """Return whether this server's page opened the WebSocket: browsers let any page open one."""
    origin = websocket.headers.get("origin")
    return origin is None or origin.partition("://")[2] == websocket.headers.get("host")


def printable(text: str) -> str:
    """Remove control characters, and reduce white space to single spaces."""
    return " ".join("".join(each for each in word if each.isprintable()) for word in text.split())


async def serve(websocket: WebSocket) -> None:
    """Serve a browser. It sends texts of 32 characters for the message id, then the message."""
    emitter: Emitter = websocket.app.state.emitter
    key: ChannelKey = websocket.app.state.key
    people: People = websocket.app.state.people
    if not same_origin(websocket):
        await websocket.close(1008)
        return
    name = printable(websocket.query_params.get("name", ""))[:24] or "Guest"

    async def send_messages() -> None:
        # A browser that reconnects receives stored messages, and recognizes known ones by their
        # ids. With resume=True, a server that reconnects reads back what it has missed.
        async with emitter.subscribe(key, CHANNEL, last=50, resume=True) as messages:
            async for message in messages:
                await websocket.send_text(message.binary.decode(errors="replace"))

    async def send_people() -> None:
        while True:
            changed, live = people.changed, emitter.state == "connected"
            await websocket.send_json({"people": people.names, "live": live})
            with anyio.move_on_after(10):  # the browser reconnects after 25 s without data
                await changed.wait()
            await people.pause()

    await websocket.accept()
    try:
        with people.visit(name):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send_people)
                tasks.start_soon(send_messages)
                async for data in websocket.iter_text():
                    id, text = data[:32], data[32:2032]
                    message = {"id": id, "name": name, "text": text, "at": time.time()}
                    await emitter.publish(key, CHANNEL, message, ttl=86400, qos=1)
                tasks.cancel_scope.cancel()
    except* (EmitterError, WebSocketDisconnect):
        pass  # the browser reconnects, and sends its unconfirmed messages again


static = StaticFiles(directory=Path(__file__).parent / "static", html=True)
app = Starlette(lifespan=lifespan, routes=[WebSocketRoute("/chat", serve), Mount("/", static)])
