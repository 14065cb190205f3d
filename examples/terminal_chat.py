"""
A chat in the terminal: who is there, the last that was said, and what you type.

    python examples/terminal_chat.py ann

starts a development broker of its own, and says how ben joins from another terminal. Or take
yours, named by EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET. Ctrl-D leaves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio import to_thread

from emitter_anyio import ConnectionLostError, Emitter, connect
from emitter_anyio.testing import Broker

CHANNEL = "terminal/chat/"


@asynccontextmanager
async def broker() -> AsyncIterator[tuple[str, str]]:
    """Give the URL and the secret key of a broker."""
    if url := os.environ.get("EMITTER_URL"):
        yield url, os.environ["EMITTER_SECRET"]
    else:
        async with Broker() as own:
            print("In another terminal (the secret is good for this broker, while it lasts):\n")
            print(f"EMITTER_URL={own.url} EMITTER_SECRET={own.secret_key} \\")
            print("    python examples/terminal_chat.py ben\n", flush=True)
            yield own.url, own.secret_key


async def show_messages(emitter: Emitter, key: str) -> None:
    # resume: when the link has been away, what was said meanwhile is read back.
    async with emitter.subscribe(key, CHANNEL, last=10, resume=True) as messages:
        async for message in messages:
            said = message.as_object()
            print(f"{said['name']}: {said['text']}", flush=True)


async def show_people(emitter: Emitter, key: str) -> None:
    async with emitter.watch_presence(key, CHANNEL) as changes:
        async for _ in changes:
            names = sorted(member.username or "?" for member in changes.members.values())
            print(f"-- here: {', '.join(names)}", flush=True)


async def read_line() -> str:
    """Read a line in a thread, which is left to itself when nobody waits any more."""
    return await to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)


async def main(name: str) -> None:
    async with broker() as (url, secret), connect(url, username=name) as emitter:
        key = (await emitter.keygen(secret, CHANNEL, "rwslp")).key
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(show_messages, emitter, key)
            tasks.start_soon(show_people, emitter, key)
            while line := await read_line():
                said = {"name": name, "text": line.strip()}
                try:
                    await emitter.publish(key, CHANNEL, said, ttl=3600, qos=1, echo=False)
                except ConnectionLostError:
                    print("-- the link was lost just now: perhaps nobody has read that")
            tasks.cancel_scope.cancel()


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("who are you?  python examples/terminal_chat.py NAME")
    try:
        anyio.run(main, sys.argv[1], backend="trio" if "trio" in sys.argv[2:] else "asyncio")
    except KeyboardInterrupt:
        pass
