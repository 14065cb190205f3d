"""
A service in a Trio nursery: the client, what it serves and what it does besides are tasks.

Run it as it is, with a development broker of its own:  python examples/trio_service.py
Or with yours, named by EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET. Ctrl-C or SIGTERM ends
it, as systemd and Docker do.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial

import trio

from emitter_anyio import Emitter, EmitterMessage, connect
from emitter_anyio.testing import Broker


@asynccontextmanager
async def broker() -> AsyncIterator[tuple[str, str]]:
    """Give the URL and the secret key of a broker."""
    if url := os.environ.get("EMITTER_URL"):
        yield url, os.environ["EMITTER_SECRET"]
    else:
        async with Broker() as own:
            yield own.url, own.secret_key


def tell_time(request: EmitterMessage) -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


async def tick(emitter: Emitter, key: str) -> None:
    while True:
        # Stored until the next but one: whoever subscribes gets the latest at once.
        await emitter.publish(key, "clock/tick/", datetime.now(UTC).timestamp(), ttl=2)
        await trio.sleep(1)


async def main() -> None:
    async with broker() as (url, secret):
        emitter = connect(url, username="clock")
        # A link that is lost comes back. If the client ends for good, or a task fails, the nursery
        # cancels the others, and the program ends with the reason.
        async with trio.open_nursery() as nursery:
            await nursery.start(emitter.run)
            key = (await emitter.keygen(secret, "clock/#/", "rws")).key
            await nursery.start(partial(emitter.serve, key, "clock/ask/", tell_time))
            nursery.start_soon(tick, emitter, key)

            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                print("the clock is running", flush=True)
                await anext(aiter(signals))

            # What was published before is sent, then the link is closed, and the tasks end.
            await emitter.disconnect()
            nursery.cancel_scope.cancel()
        print("the clock has stopped")


if __name__ == "__main__":
    trio.run(main)
