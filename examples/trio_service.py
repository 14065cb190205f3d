"""
A service in a Trio nursery: the client, a request handler and a publisher run as tasks.

Run it with a development broker:  python examples/trio_service.py
To use your own broker, set EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET. Stop it
with Ctrl-C or SIGTERM, which systemd and Docker send.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial

import trio

from emitter_anyio import ChannelKey, Emitter, EmitterMessage, connect
from emitter_anyio.testing import Broker


@asynccontextmanager
async def broker() -> AsyncIterator[tuple[str, str]]:
    """Yield the URL and the secret key of your broker, or of a new development broker."""
    if url := os.environ.get("EMITTER_URL"):
        yield url, os.environ["EMITTER_SECRET"]
    else:
        async with Broker() as own:
            yield own.url, own.secret_key


def tell_time(request: EmitterMessage) -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


async def tick(emitter: Emitter, key: ChannelKey) -> None:
    while True:
        # Stored for two seconds, so that a new subscriber receives the latest tick immediately.
        await emitter.publish(key, "clock/tick/", datetime.now(UTC).timestamp(), ttl=2)
        await trio.sleep(1)


async def main() -> None:
    async with broker() as (url, secret):
        emitter = connect(url, username="clock")
        # The client reconnects automatically. If it gives up, or a task fails, the nursery cancels
        # the other tasks and the program ends with that exception.
        async with trio.open_nursery() as nursery:
            await nursery.start(emitter.run)
            key = await emitter.keygen(secret, "clock/#/", "rws")
            await nursery.start(partial(emitter.serve, key, "clock/ask/", tell_time))
            nursery.start_soon(tick, emitter, key)

            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                print("clock service started", flush=True)
                await anext(aiter(signals))

            # Send the queued messages, disconnect, then end the other tasks.
            await emitter.disconnect()
            nursery.cancel_scope.cancel()
        print("clock service stopped")


if __name__ == "__main__":
    trio.run(main)
