"""
mqttium with its iterator, or with a callback in the case ``handler``; not on uvloop.

Publishes with QoS 1 keep a window of receipts, which its documentation prefers to tasks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mqttium.api import AsyncClient

from benchmarks.clients import aio, common
from benchmarks.clients.common import HOST, Figures, Job, Meter
from benchmarks.wire import DONE, channel, topic


@asynccontextmanager
async def connection(job: Job, keepalive: int = 60, on_message=None) -> AsyncIterator[AsyncClient]:
    client = AsyncClient(
        keepalive=keepalive,
        max_outbound_inflight=max(20, job.in_flight),
        message_delivery="iterator" if on_message is None else "callback",
    )
    if on_message is not None:
        client.on_message = on_message
    if job.websocket:
        await client.connect_ws(f"ws://{HOST}:{job.port}/mqtt")
    else:
        await client.connect(HOST, job.port, ssl=job.context)
    try:
        yield client
    finally:
        await client.disconnect()


async def receive(job: Job) -> Figures:
    meter = Meter()
    async with connection(job) as client:
        await client.subscribe(aio.channels(job))
        messages = client.messages()
        size = len((await anext(messages)).payload)
        left = job.messages - 1
        meter.start()
        async for message in messages:
            size += len(message.payload)
            left -= 1
            if not left:
                break
        meter.stop()
    common.check_size(job, size)
    return meter.figures(job.messages)


async def handler(job: Job) -> Figures:
    done = asyncio.Event()
    countdown = common.Countdown(job, done.set)
    take = countdown.take

    def on_message(message):
        take(message.payload)

    async with connection(job, on_message=on_message) as client:
        await client.subscribe(aio.channels(job))
        await done.wait()
    return countdown.figures()


async def publish(job: Job) -> Figures:
    meter, body, name = Meter(), job.body, topic(0)
    async with connection(job) as client:
        await client.subscribe(DONE)
        meter.start()
        for _ in range(job.messages):
            await client.publish(name, body)
        await anext(client.messages())
        meter.stop()
    return meter.figures(job.messages)


async def confirmed(job: Job) -> Figures:
    body, name = job.body, topic(0)
    async with connection(job) as client:
        return await aio.window(job, lambda: client.publish(name, body, qos=1))


async def round_trip(job: Job) -> Figures:
    body, name = job.body, topic(0)
    async with connection(job) as client:
        await client.subscribe(channel(0))
        messages = client.messages()
        return await aio.trips(job, lambda: client.publish(name, body), lambda: anext(messages))


async def stalled(job: Job) -> Figures:
    async with connection(job) as client:
        before = common.memory()
        await client.subscribe(channel(0))
        return await aio.stall(before)


CASES = {
    "receive": receive,
    "handler": handler,
    "publish": publish,
    "confirmed": confirmed,
    "round_trip": round_trip,
    "stalled": stalled,
    **aio.shared(connection, lambda client, name, body: client.publish(name, body)),
}

if __name__ == "__main__":
    common.main({name: aio.run(case) for name, case in CASES.items()}, "mqttium.api")
