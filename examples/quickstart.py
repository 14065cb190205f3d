"""
Publish, replay and receive messages, and handle a refusal.

Run it with a development broker:  python examples/quickstart.py
To use your own broker, set EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET.
"""

from __future__ import annotations

import sys

import anyio

from emitter_anyio import EmitterError, connect
from emitter_anyio.testing import ConfiguredBroker

CHANNEL = "quickstart/kitchen/"


async def main() -> None:
    async with ConfiguredBroker() as broker, connect(broker.url) as emitter:
        # The key permits reading, writing, storing and loading on this channel only.
        key = await emitter.keygen(broker.secret_key, CHANNEL, "rwsl")

        # ttl=60 stores these messages for a minute, because there is no subscriber yet.
        for degrees in (19, 20):
            await emitter.publish(key, CHANNEL, {"degrees": degrees}, ttl=60, qos=1)

        # Leaving this block unsubscribes. last=2 first replays the two stored messages.
        async with emitter.subscribe(key, CHANNEL, last=2) as messages:
            await emitter.publish(key, CHANNEL, {"degrees": 21})
            async for message in messages:
                degrees = message.as_object()["degrees"]
                print(f"{message.channel} {degrees} degrees")
                if degrees == 21:
                    break

        # The key is for another channel. The refused call raises the error.
        try:
            await emitter.publish(key, "quickstart/garden/", "hello", qos=1)
        except EmitterError as error:
            print(f"refused as expected: {error}")


if __name__ == "__main__":
    anyio.run(main, backend="trio" if "trio" in sys.argv else "asyncio")
