"""
A client in a Trio nursery, beside the tasks that use it.

Run it as it is, with a development broker of its own:  python examples/trio_nursery.py
Or with yours, named by EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from emitter_anyio import Emitter, connect
from emitter_anyio.testing import Broker

CHANNEL = "nursery/steps/"


@asynccontextmanager
async def broker() -> AsyncIterator[tuple[str, str]]:
    """Give the URL and the secret key of a broker."""
    if url := os.environ.get("EMITTER_URL"):
        yield url, os.environ["EMITTER_SECRET"]
    else:
        async with Broker() as own:
            yield own.url, own.secret_key


async def walk(emitter: Emitter, key: str) -> None:
    for step in ("left", "right", "stop"):
        await emitter.publish(key, CHANNEL, step)


async def watch(
    emitter: Emitter,
    key: str,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    async with emitter.subscribe(key, CHANNEL, last=0) as messages:
        task_status.started()
        async for message in messages:
            print(f"{message.channel} {message.as_string()}")
            if message.as_string() == "stop":
                return


async def main() -> None:
    async with broker() as (url, secret):
        emitter = connect(url)
        # Should the link be lost, run() raises, and the nursery cancels all who used it.
        async with trio.open_nursery() as nursery:
            await nursery.start(emitter.run)
            key = (await emitter.keygen(secret, CHANNEL, "rw")).key
            async with trio.open_nursery() as users:
                await users.start(watch, emitter, key)
                users.start_soon(walk, emitter, key)
            # They are done. run() ends with the link, and then the nursery.
            await emitter.disconnect()
        print("everybody is home")


if __name__ == "__main__":
    trio.run(main)
