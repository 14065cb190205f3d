"""
Sensors, and an aggregator that misses no reading although its connection is lost.

Run it with a development broker:  python examples/sensors.py
To use your own broker, set EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskStatus

from emitter_anyio import ChannelKey, Emitter, connect
from emitter_anyio.testing import Broker

ROOMS = {"attic": 25.0, "cellar": 12.0, "kitchen": 21.0}
READINGS = 10


@asynccontextmanager
async def broker() -> AsyncIterator[tuple[str, str, Broker | None]]:
    """Yield the URL and the secret key of a broker, and the broker if this program started it."""
    if url := os.environ.get("EMITTER_URL"):
        yield url, os.environ["EMITTER_SECRET"], None
    else:
        async with Broker() as own:
            yield own.url, own.secret_key, own


async def measure(emitter: Emitter, key: ChannelKey, room: str, numbers: range) -> None:
    for number in numbers:
        reading = {"number": number, "degrees": ROOMS[room] + number / 10}
        # The broker stores each reading, so that the aggregator can read it back.
        await emitter.publish(key, f"sensors/{room}/", reading, ttl=3600, qos=1)


async def aggregate(
    emitter: Emitter, key: ChannelKey, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    rooms: dict[str, dict[int, float]] = {room: {} for room in ROOMS}
    read_back = 0
    async with emitter.subscribe(key, "sensors/", last=0, resume=True) as messages:
        task_status.started()
        async for message in messages:
            reading, room = message.as_object(), message.channel.split("/")[1]
            # Around a gap a message can arrive twice, so count each number once.
            if reading["number"] not in rooms[room]:
                rooms[room][reading["number"]] = reading["degrees"]
                read_back += message.replayed
            if all(len(readings) == READINGS for readings in rooms.values()):
                break
    for room, readings in rooms.items():
        mean = sum(readings.values()) / READINGS
        print(f"{room}: {len(readings)} readings, {mean:.2f} degrees on average")
    print(f"{read_back} of the readings were read back after the connection was lost")


async def main() -> None:
    async with (
        broker() as (url, secret, own),
        connect(url) as emitter,
        connect(url, client_id="aggregator") as aggregator,
        anyio.create_task_group() as tasks,
    ):
        key = await emitter.keygen(secret, "sensors/#/", "rwsl")
        await tasks.start(aggregate, aggregator, key)
        for numbers in (range(READINGS // 2), range(READINGS // 2, READINGS)):
            async with anyio.create_task_group() as sensors:
                for room in ROOMS:
                    sensors.start_soon(measure, emitter, key, room, numbers)
            if own and numbers.start == 0:
                # Only the aggregator loses its connection. It reconnects automatically.
                await own.drop("aggregator")


if __name__ == "__main__":
    anyio.run(main, backend="trio" if "trio" in sys.argv else "asyncio")
