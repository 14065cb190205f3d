"""
The same work in the manner of the original Emitter SDK: handlers, and a program that waits.

Run it as it is, with a development broker of its own:  python examples/handlers.py
Or with yours, named by EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from emitter_anyio import EmitterMessage, PresenceEvent, connect
from emitter_anyio.testing import Broker

CHANNEL = "handlers/countdown/"


@asynccontextmanager
async def broker() -> AsyncIterator[tuple[str, str]]:
    """Give the URL and the secret key of a broker."""
    if url := os.environ.get("EMITTER_URL"):
        yield url, os.environ["EMITTER_SECRET"]
    else:
        async with Broker() as own:
            yield own.url, own.secret_key


async def main() -> None:
    async with broker() as (url, secret):
        emitter = connect(url, username="houston")
        key = ""

        # Handlers may be registered before there is a link, and be def or async def.
        emitter.on("connect", lambda: print("connected"))
        emitter.on("disconnect", lambda: print("disconnected"))
        emitter.on("error", lambda error: print(f"error: {error}"))

        @emitter.on("message")
        async def count_down(message: EmitterMessage) -> None:
            number = message.asObject()
            print(f"{message.channel} {number}")
            if number > 0:
                await emitter.publish(key, CHANNEL, number - 1)
            else:
                # Ends wait_closed() below, and so the program.
                await emitter.disconnect()

        @emitter.on("presence")
        def show(event: PresenceEvent) -> None:
            print(f"presence: {event.event} {[member.username for member in event.who]}")

        async with emitter:
            key = (await emitter.keygen(secret, CHANNEL, "rwp")).key
            await emitter.subscribe(key, CHANNEL)
            # The status is returned here, and given to on("presence") as well.
            await emitter.presence(key, CHANNEL)
            await emitter.publish(key, CHANNEL, 3)
            await emitter.wait_closed()


if __name__ == "__main__":
    anyio.run(main, backend="trio" if "trio" in sys.argv else "asyncio")
