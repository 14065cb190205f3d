"""
Plain asyncio: a monitor notices that a sensor is silent. The program does not use AnyIO itself.

Run it with a development broker:  python examples/plain_asyncio.py
To use your own broker, set EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET. The program prints
readings until the sensor is switched off after two seconds, or until Ctrl-C.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import count

from emitter_anyio import ChannelKey, Emitter, connect
from emitter_anyio.testing import ConfiguredBroker

CHANNEL = "boiler/pressure/"


async def measure(emitter: Emitter, key: ChannelKey) -> None:
    for number in count():
        await emitter.publish(key, CHANNEL, {"bar": 1.5 + number / 10}, qos=1)
        await asyncio.sleep(0.5)


async def monitor(emitter: Emitter, key: ChannelKey, ready: asyncio.Event) -> None:
    async with emitter.subscribe(key, CHANNEL) as readings:
        ready.set()
        try:
            while True:
                # A timeout loses no reading: the stream keeps it for the next call.
                async with asyncio.timeout(1):
                    reading = await readings.receive()
                print(f"{reading.as_object()['bar']:.1f} bar", flush=True)
        except TimeoutError:
            print("no reading for a second")


async def main() -> None:
    async with ConfiguredBroker() as broker, connect(broker.url) as emitter:
        # Calls can run in parallel, on the same connection.
        write_key, read_key = await asyncio.gather(
            emitter.keygen(broker.secret_key, CHANNEL, "w"),
            emitter.keygen(broker.secret_key, CHANNEL, "r"),
        )
        async with asyncio.TaskGroup() as tasks:
            ready = asyncio.Event()
            tasks.create_task(monitor(emitter, read_key, ready))
            await ready.wait()
            sensor = tasks.create_task(measure(emitter, write_key))
            await asyncio.sleep(2)
            sensor.cancel()
            print("the sensor was switched off", flush=True)


if __name__ == "__main__":
    # Ctrl-C cancels main(), so that each block is left and the client disconnects.
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
