"""
gmqtt with callbacks.

Its ``publish`` is not awaitable and does not report the PUBACK, so the case ``confirmed`` is
missing. A loop of publishes must yield itself. Here it does so every 64 calls, like emitter_anyio.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gmqtt import Client
from gmqtt.mqtt.constants import MQTTv311

from benchmarks.clients import aio, common
from benchmarks.clients.common import HOST, Figures, Job, Meter
from benchmarks.wire import DONE, channel, topic


@asynccontextmanager
async def connection(job: Job, keepalive: int = 60, on_message=None) -> AsyncIterator[Client]:
    client = Client(f"bench{id(object())}")
    if on_message is not None:
        client.on_message = on_message
    context = job.context
    await client.connect(
        HOST, job.port, ssl=context or False, keepalive=keepalive, version=MQTTv311
    )
    try:
        yield client
    finally:
        await client.disconnect()


async def receive(job: Job) -> Figures:
    done = asyncio.Event()
    countdown = common.Countdown(job, done.set)
    take = countdown.take

    def on_message(client, topic, payload, qos, properties):
        take(payload)
        return 0

    async with connection(job, on_message=on_message) as client:
        for name in aio.channels(job):
            client.subscribe(name)
        await done.wait()
    return countdown.figures()


async def publish(job: Job) -> Figures:
    meter, body, name, bell = Meter(), job.body, topic(0), aio.Bell()

    def on_message(client, topic, payload, qos, properties):
        bell.ring()
        return 0

    async with connection(job, on_message=on_message) as client:
        client.subscribe(DONE)
        await asyncio.sleep(0.05)
        meter.start()
        for number in range(job.messages):
            client.publish(name, body)
            if not number & 63:
                await asyncio.sleep(0)
        await bell.wait()
        meter.stop()
    return meter.figures(job.messages)


async def round_trip(job: Job) -> Figures:
    body, name, bell = job.body, topic(0), aio.Bell()

    def on_message(client, topic, payload, qos, properties):
        bell.ring()
        return 0

    async with connection(job, on_message=on_message) as client:
        client.subscribe(channel(0))
        return await aio.trips(job, lambda: client.publish(name, body), bell.wait, awaited=False)


async def stalled(job: Job) -> Figures:
    queue = asyncio.Queue()

    def on_message(client, topic, payload, qos, properties):
        queue.put_nowait(payload)
        return 0

    async with connection(job, on_message=on_message) as client:
        before = common.memory()
        client.subscribe(channel(0))
        return await aio.stall(before)


CASES = {
    "receive": receive,
    "handler": receive,
    "publish": publish,
    "round_trip": round_trip,
    "stalled": stalled,
    **aio.shared(connection, lambda client, name, body: client.publish(name, body)),
}

if __name__ == "__main__":
    common.main({name: aio.run(case) for name, case in CASES.items()}, "gmqtt")
