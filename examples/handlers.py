"""
Handlers, as in the original Emitter SDK: register them, subscribe, and wait.

Run it with a development broker:  python examples/handlers.py
To use your own broker, set EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET.
"""

from __future__ import annotations

import sys

import anyio

from emitter_anyio import ChannelKey, EmitterMessage, PresenceEvent, connect
from emitter_anyio.testing import ConfiguredBroker

CHANNEL = "handlers/countdown/"


async def main() -> None:
    async with ConfiguredBroker() as broker:
        emitter = connect(broker.url, username="houston")
        key: ChannelKey

        # A handler can be registered before connecting, and can be def or async def.
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
                # This makes wait_closed() below return.
                await emitter.disconnect()

        @emitter.on("presence")
        def show(event: PresenceEvent) -> None:
            print(f"presence: {event.event} {[member.username for member in event.who]}")

        async with emitter:
            key = await emitter.keygen(broker.secret_key, CHANNEL, "rwp")
            await emitter.subscribe(key, CHANNEL)
            # The call returns the status, and on("presence") receives it too.
            await emitter.presence(key, CHANNEL)
            await emitter.publish(key, CHANNEL, 3)
            await emitter.wait_closed()


if __name__ == "__main__":
    anyio.run(main, backend="trio" if "trio" in sys.argv else "asyncio")
