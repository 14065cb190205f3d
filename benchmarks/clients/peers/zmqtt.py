"""zmqtt with its subscriptions."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, AsyncExitStack

from zmqtt import QoS, create_client

from benchmarks.clients import aio, common
from benchmarks.clients.common import HOST, Figures, Job, Meter
from benchmarks.wire import DONE, channel, topic


def connection(job: Job, keepalive: int = 60) -> AbstractAsyncContextManager:
    return create_client(HOST, job.port, keepalive=keepalive, tls=job.context or False)


async def receive(job: Job) -> Figures:
    meter = Meter()
    async with connection(job) as client, AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(client.subscribe(name)) for name in aio.channels(job)
        ]
        size = len((await streams[0].get_message()).payload)
        left = job.messages - 1
        meter.start()
        async for message in streams[0]:
            size += len(message.payload)
            left -= 1
            if not left:
                break
        meter.stop()
    common.check_size(job, size)
    return meter.figures(job.messages)


async def fan_in(job: Job) -> Figures:
    done = asyncio.Event()
    countdown = common.Countdown(job, done.set)
    take = countdown.take

    async def iterate(messages):
        async for message in messages:
            take(message.payload)

    tasks = []
    async with connection(job) as client, AsyncExitStack() as stack:
        for name in aio.channels(job):
            messages = await stack.enter_async_context(client.subscribe(name))
            tasks.append(asyncio.create_task(iterate(messages)))
        await done.wait()
        for task in tasks:
            task.cancel()
    return countdown.figures()


async def publish(job: Job) -> Figures:
    meter, body, name = Meter(), job.body, topic(0)
    async with connection(job) as client, client.subscribe(DONE) as done:
        meter.start()
        for _ in range(job.messages):
            await client.publish(name, body)
        await done.get_message()
        meter.stop()
    return meter.figures(job.messages)


async def confirmed(job: Job) -> Figures:
    body, name = job.body, topic(0)
    async with connection(job) as client:
        return await aio.workers(job, lambda: client.publish(name, body, qos=QoS.AT_LEAST_ONCE))


async def round_trip(job: Job) -> Figures:
    body, name = job.body, topic(0)
    async with connection(job) as client, client.subscribe(channel(0)) as messages:
        return await aio.trips(job, lambda: client.publish(name, body), messages.get_message)


async def stalled(job: Job) -> Figures:
    async with connection(job) as client:
        before = common.memory()
        async with client.subscribe(channel(0)):
            return await aio.stall(before)


CASES = {
    "receive": receive,
    "handler": receive,
    "fan_in": fan_in,
    "publish": publish,
    "confirmed": confirmed,
    "round_trip": round_trip,
    "stalled": stalled,
    **aio.shared(connection, lambda client, name, body: client.publish(name, body)),
}

if __name__ == "__main__":
    common.main({name: aio.run(case) for name, case in CASES.items()}, "zmqtt")
