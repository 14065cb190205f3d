"""
Request and reply: one client serves a channel, another asks there, and errors come back, too.

Run it as it is, with a development broker of its own:  python examples/request_reply.py
Or with yours, named by EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from emitter_anyio import Emitter, EmitterMessage, ReplyError, RequestTimeoutError, connect
from emitter_anyio.testing import Broker

CHANNEL = "calculator/divide/"


@asynccontextmanager
async def broker() -> AsyncIterator[tuple[str, str]]:
    """Give the URL and the secret key of a broker."""
    if url := os.environ.get("EMITTER_URL"):
        yield url, os.environ["EMITTER_SECRET"]
    else:
        async with Broker() as own:
            yield own.url, own.secret_key


async def divide(request: EmitterMessage) -> float:
    """Serve a request. Each runs in a task of its own, and is cancelled if the asker gives up."""
    dividend, divisor = request.as_object()
    return float(dividend / divisor)


async def ask(emitter: Emitter, key: str, dividend: float, divisor: float) -> None:
    try:
        reply = await emitter.request(key, CHANNEL, [dividend, divisor])
        print(f"{dividend} / {divisor} = {reply.as_object()}")
    except ReplyError as error:
        print(f"{dividend} / {divisor}: {error}")


async def main() -> None:
    async with (
        broker() as (url, secret),
        connect(url) as server,
        connect(url) as asker,
        anyio.create_task_group() as tasks,
    ):
        # Requests and replies travel below the channel.
        key = (await server.keygen(secret, "calculator/#/", "rw")).key

        # Returns when requests are served: from then on nobody asks in vain.
        await tasks.start(server.serve, key, CHANNEL, divide)

        await ask(asker, key, 1, 4)
        await ask(asker, key, 1, 0)

        try:
            await asker.request(key, "calculator/multiply/", [6, 7], timeout=0.2)
        except RequestTimeoutError as error:
            print(error)

        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    # The traceback of what divide() raises would be logged here, where it is served.
    logging.getLogger("emitter_anyio").setLevel(logging.ERROR)
    anyio.run(main, backend="trio" if "trio" in sys.argv else "asyncio")
