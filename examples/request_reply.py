"""
Request and reply: one client serves a channel, and another sends requests to it.

Run it with a development broker:  python examples/request_reply.py
To use your own broker, set EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET.
"""

from __future__ import annotations

import logging
import sys

import anyio

from emitter_anyio import (
    ChannelKey,
    Emitter,
    EmitterMessage,
    ReplyError,
    RequestTimeoutError,
    connect,
)
from emitter_anyio.testing import ConfiguredBroker

CHANNEL = "calculator/divide/"


async def divide(request: EmitterMessage) -> float:
    """Serve one request, in a new task. It is cancelled if the requesting call is cancelled."""
    dividend, divisor = request.as_object()
    return float(dividend / divisor)


async def request_division(
    emitter: Emitter, key: ChannelKey, dividend: float, divisor: float
) -> None:
    try:
        reply = await emitter.request(key, CHANNEL, [dividend, divisor])
        print(f"{dividend} / {divisor} = {reply.as_object()}")
    except ReplyError as error:
        print(f"{dividend} / {divisor}: {error}")


async def main() -> None:
    async with (
        ConfiguredBroker() as broker,
        connect(broker.url) as server,
        connect(broker.url) as client,
        anyio.create_task_group() as tasks,
    ):
        # Requests and replies use channels below this one, so the key ends in #/.
        key = await server.keygen(broker.secret_key, "calculator/#/", "rw")

        # start() returns when the server is ready for requests.
        await tasks.start(server.serve, key, CHANNEL, divide)

        await request_division(client, key, 1, 4)
        await request_division(client, key, 1, 0)

        try:
            # No client serves this channel.
            await client.request(key, "calculator/multiply/", [6, 7], timeout=0.2)
        except RequestTimeoutError as error:
            print(error)

        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    # The server logs the traceback of an exception in divide(); hide it here.
    logging.getLogger("emitter_anyio").setLevel(logging.ERROR)
    anyio.run(main, backend="trio" if "trio" in sys.argv else "asyncio")
