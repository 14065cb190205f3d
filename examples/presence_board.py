"""
A presence board: it shows who is in the office while people come and go.

Run it with a development broker:  python examples/presence_board.py
To use your own broker, set EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

import anyio

from emitter_anyio import ChannelKey, Emitter, Member, PresenceEvent, connect
from emitter_anyio.testing import ConfiguredBroker

CHANNEL = "office/"
VERBS = {"subscribe": "arrived", "unsubscribe": "left"}


def draw(change: PresenceEvent, members: Iterable[Member]) -> None:
    # The first event is a status. Later ones correct the board if a change was missed.
    if change.event == "status":
        news = "current status"
    else:
        news = f"{change.who[0].username} {VERBS[change.event]}"
    names = sorted(member.username or "anonymous" for member in members)
    present = ", ".join(names) or "-"
    print(f"{change.time:%H:%M:%S}  {news:<14}  in the office: {present}", flush=True)


async def keep_board(emitter: Emitter, key: ChannelKey, until_left: str) -> None:
    async with emitter.watch_presence(key, CHANNEL) as changes:
        async for change in changes:
            draw(change, changes.members.values())
            if change.event == "unsubscribe" and change.who[0].username == until_left:
                return


@asynccontextmanager
async def in_the_office(url: str, key: ChannelKey, name: str) -> AsyncIterator[None]:
    """Stay subscribed to the channel, so that presence lists the user name."""
    async with connect(url, username=name) as emitter, emitter.subscribe(key, CHANNEL, last=0):
        yield


async def main() -> None:
    async with (
        ConfiguredBroker() as broker,
        connect(broker.url) as emitter,
        anyio.create_task_group() as tasks,
    ):
        key = await emitter.keygen(broker.secret_key, CHANNEL, "rp")
        async with in_the_office(broker.url, key, "ann"):
            tasks.start_soon(keep_board, emitter, key, "ann")
            async with AsyncExitStack() as others:
                for name in ("ben", "carl"):
                    await anyio.sleep(0.2)
                    # Leave one after another, because the broker reports simultaneous changes
                    # in any order.
                    others.push_async_callback(anyio.sleep, 0.2)
                    await others.enter_async_context(in_the_office(broker.url, key, name))
                await anyio.sleep(0.2)


if __name__ == "__main__":
    backend = "trio" if "trio" in sys.argv else "asyncio"
    # By default, Trio raises KeyboardInterrupt in any line of any task.
    options = {"restrict_keyboard_interrupt_to_checkpoints": True} if backend == "trio" else {}
    try:
        anyio.run(main, backend=backend, backend_options=options)
    except* KeyboardInterrupt:
        pass  # Ctrl-C: all connections are closed
