"""
Publish, receive, replay: the whole of a small program.

Run it as it is, with a development broker of its own:  python examples/quickstart.py
Or with yours, named by EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from emitter_anyio import EmitterError, connect
from emitter_anyio.testing import Broker

CHANNEL = "quickstart/kitchen/"


@asynccontextmanager
async def broker() -> AsyncIterator[tuple[str, str]]:
    """Give the URL and the secret key of a broker."""
    if url := os.environ.get("EMITTER_URL"):
        yield url, os.environ["EMITTER_SECRET"]
    else:
        async with Broker() as own:
            yield own.url, own.secret_key


async def main() -> None:
    async with broker() as (url, secret), connect(url) as emitter:
        # r read, w write, s store, l load: whoever has this key may do that, and here only
        made = await emitter.keygen(secret, CHANNEL, "rwsl")

        # Nobody listens yet, so these are stored: for a minute.
        for degrees in (19, 20):
            await emitter.publish(made.key, CHANNEL, {"degrees": degrees}, ttl=60, qos=1)

        # The subscription lasts as long as the block; last=2 brings the two from before.
        async with emitter.subscribe(made.key, CHANNEL, last=2) as messages:
            await emitter.publish(made.key, CHANNEL, {"degrees": 21})
            async for message in messages:
                degrees = message.as_object()["degrees"]
                print(f"{message.channel} {degrees} degrees")
                if degrees == 21:
                    break

        # A refusal is raised here, by the call that was refused.
        try:
            await emitter.publish(made.key, "quickstart/garden/", "hello", qos=1)
        except EmitterError as error:
            print(f"as it should be: {error}")


if __name__ == "__main__":
    anyio.run(main, backend="trio" if "trio" in sys.argv else "asyncio")
