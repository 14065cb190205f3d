"""
Server-sent events with FastAPI: each browser gets the latest announcements, and then new ones.

    python -m pip install . fastapi uvicorn
    python examples/fastapi_events.py

Open http://127.0.0.1:8000 in a browser, and in a second terminal, run
``curl -d "lunch is ready" http://127.0.0.1:8000/announcements``. To use your own broker, set
EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET; several servers can share it. PORT=8001
selects another port. Stop with Ctrl-C.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from socket import socket
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from emitter_anyio import Emitter, EmitterError, SlowConsumerError, connect
from emitter_anyio.testing import ConfiguredBroker

CHANNEL = "announcements/"

# After a lost connection, the browser reconnects and gets the latest announcements again. So the
# page keeps them by their ids, and sorts them by time.
PAGE = """<!doctype html><meta charset="utf-8"><title>Announcements</title>
<h1>Announcements</h1><ol></ol>
<script>
  const list = document.querySelector("ol"), shown = new Map();
  new EventSource("announcements").onmessage = (event) => {
    shown.set(event.lastEventId, JSON.parse(event.data));
    const sorted = [...shown.values()].sort((a, b) => a.at - b.at);
    list.replaceChildren(...sorted.map(({ text }) => {
      const item = document.createElement("li");
      item.textContent = text;
      return item;
    }));
  };
</script>"""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with ConfiguredBroker() as broker, connect(broker.url) as emitter:
        app.state.emitter = emitter
        app.state.key = await emitter.keygen(broker.secret_key, CHANNEL, "rwsl")
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/", response_class=HTMLResponse)
async def page() -> str:
    return PAGE


@app.post("/announcements", status_code=204)
async def announce(request: Request) -> None:
    emitter: Emitter = request.app.state.emitter
    text = (await request.body()).decode(errors="replace")
    message = {"id": uuid4().hex, "at": time.time(), "text": text}
    try:
        await emitter.publish(request.app.state.key, CHANNEL, message, ttl=86400, qos=1, timeout=5)
    except EmitterError:
        raise HTTPException(503, "try again later") from None


@app.get("/announcements", response_class=EventSourceResponse)
async def announcements(request: Request) -> AsyncIterator[ServerSentEvent]:
    emitter: Emitter = request.app.state.emitter
    # With resume=True, a server that reconnects reads back what it has missed.
    async with emitter.subscribe(request.app.state.key, CHANNEL, last=20, resume=True) as messages:
        try:
            async for message in messages:
                announcement = message.as_object()
                yield ServerSentEvent(data=announcement, id=announcement["id"])
        except SlowConsumerError:
            pass  # the response ends, and the browser reconnects


class Server(uvicorn.Server):
    """A server that ends the event streams when it is stopped: uvicorn would wait for them."""

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        await app.state.emitter.disconnect()
        await super().shutdown(sockets)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has stopped
        Server(uvicorn.Config(app, port=int(os.environ.get("PORT", "8000")))).run()
