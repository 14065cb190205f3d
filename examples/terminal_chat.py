"""
A chat in the terminal: it shows who is online, the last messages, and new ones.

    python examples/terminal_chat.py ann

starts a development broker and prints the command with which ben joins from another terminal. To
use your own broker, set EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET. Ctrl-D leaves.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from threading import Thread
from uuid import uuid4

import anyio
from anyio.abc import ObjectReceiveStream
from anyio.from_thread import BlockingPortal

from emitter_anyio import ChannelKey, ConnectionLostError, Emitter, connect
from emitter_anyio.testing import ConfiguredBroker

CHANNEL = "terminal/chat/"


async def show_messages(emitter: Emitter, key: ChannelKey, seen: set[str]) -> None:
    # After a lost connection, resume=True can deliver a message a second time, so check its id.
    async with emitter.subscribe(key, CHANNEL, last=10, resume=True) as messages:
        async for message in messages:
            line = message.as_object()
            if line["id"] not in seen:
                seen.add(line["id"])
                print(f"{line['name']}: {line['text']}", flush=True)


async def show_people(emitter: Emitter, key: ChannelKey) -> None:
    shown: list[str] = []
    async with emitter.watch_presence(key, CHANNEL) as changes:
        async for _ in changes:
            names = sorted({member.username or "?" for member in changes.members.values()})
            if names != shown:
                print(f"-- online: {', '.join(shown := names)}", flush=True)


@asynccontextmanager
async def typed_lines() -> AsyncIterator[ObjectReceiveStream[str]]:
    """Read lines in a daemon thread, because reading from a terminal cannot be cancelled."""
    send, receive = anyio.create_memory_object_stream[str]()

    def read() -> None:
        with suppress(RuntimeError):  # the portal is closed, because the program is ending
            for line in sys.stdin:
                portal.call(send.send, line)
            portal.call(send.aclose)

    async with BlockingPortal() as portal, receive, send:
        Thread(target=read, daemon=True).start()
        yield receive


async def main(name: str) -> None:
    async with ConfiguredBroker() as broker, connect(broker.url, username=name) as emitter:
        if broker.own:
            print("In another terminal, run (the secret key is for this development broker only):")
            print(f"EMITTER_URL={broker.url} EMITTER_SECRET={broker.secret_key} \\")
            print("    python examples/terminal_chat.py ben", flush=True)
        key, seen = await emitter.keygen(broker.secret_key, CHANNEL, "rwslp"), set[str]()
        async with typed_lines() as lines, anyio.create_task_group() as tasks:
            tasks.start_soon(show_messages, emitter, key, seen)
            tasks.start_soon(show_people, emitter, key)
            async for text in lines:
                line = {"id": uuid4().hex, "name": name, "text": text.strip()}
                seen.add(line["id"])
                try:
                    await emitter.publish(key, CHANNEL, line, ttl=3600, qos=1, echo=False)
                except ConnectionLostError:
                    print("-- connection lost: your last message might not have been delivered")
            tasks.cancel_scope.cancel()


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python examples/terminal_chat.py NAME")
    backend = "trio" if "trio" in sys.argv[2:] else "asyncio"
    # By default, Trio raises KeyboardInterrupt in any line of any task.
    options = {"restrict_keyboard_interrupt_to_checkpoints": True} if backend == "trio" else {}
    try:
        anyio.run(main, sys.argv[1], backend=backend, backend_options=options)
    except* KeyboardInterrupt:
        pass
