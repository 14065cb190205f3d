"""
Sensors, and an aggregator that misses no reading although its connection is lost.

Run it with a development broker:  python examples/sensors.py
To use your own broker, set EMITTER_URL (mqtt://HOST:PORT) and EMITTER_SECRET.
"""

from __future__ import annotations

import sys

import anyio
from anyio.abc import TaskStatus

from emitter_anyio import ChannelKey, Emitter, connect
from emitter_anyio.testing import ConfiguredBroker

ROOMS = {"attic": 25.0, "cellar": 12.0, "kitchen": 21.0}
READINGS = 10


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
        ConfiguredBroker() as broker,
        connect(broker.url) as emitter,
        connect(broker.url, client_id="aggregator") as aggregator,
        anyio.create_task_group() as tasks,
    ):
        key = await emitter.keygen(broker.secret_key, "sensors/#/", "rwsl")
        await tasks.start(aggregate, aggregator, key)
        for numbers in (range(READINGS // 2), range(READINGS // 2, READINGS)):
            async with anyio.create_task_group() as sensors:
                for room in ROOMS:
                    sensors.start_soon(measure, emitter, key, room, numbers)
            if broker.own and numbers.start == 0:
                # Only the aggregator loses its connection. It reconnects automatically.
                await broker.own.drop("aggregator")


if __name__ == "__main__":
    anyio.run(main, backend="trio" if "trio" in sys.argv else "asyncio")
