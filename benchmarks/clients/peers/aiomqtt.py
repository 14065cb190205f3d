"""aiomqtt 2, which runs Paho on asyncio."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from aiomqtt import Client

from benchmarks.clients import aio, common
from benchmarks.clients.common import HOST, Figures, Job, Meter
from benchmarks.wire import DONE, channel, topic


def connection(job: Job, keepalive: int = 60) -> AbstractAsyncContextManager[Client]:
    client = Client(
        HOST,
        job.port,
        keepalive=keepalive,
        tls_context=job.context,
        transport="websockets" if job.websocket else "tcp",
        max_inflight_messages=max(20, job.in_flight),
    )
    client.pending_calls_threshold = 1000  # By default it warns at ten.
    return client


async def receive(job: Job) -> Figures:
    meter = Meter()
    async with connection(job) as client:
        await client.subscribe([(name, 0) for name in aio.channels(job)])
        messages = client.messages
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


async def publish(job: Job) -> Figures:
    meter, body, name = Meter(), job.body, topic(0)
    async with connection(job) as client:
        await client.subscribe(DONE)
        meter.start()
        for _ in range(job.messages):
            await client.publish(name, body)
        await anext(client.messages)
        meter.stop()
    return meter.figures(job.messages)


async def confirmed(job: Job) -> Figures:
    body, name = job.body, topic(0)
    async with connection(job) as client:
        return await aio.workers(job, lambda: client.publish(name, body, qos=1))


async def round_trip(job: Job) -> Figures:
    body, name = job.body, topic(0)
    async with connection(job) as client:
        await client.subscribe(channel(0))
        messages = client.messages
        return await aio.trips(job, lambda: client.publish(name, body), lambda: anext(messages))


async def stalled(job: Job) -> Figures:
    async with connection(job) as client:
        before = common.memory()
        await client.subscribe(channel(0))
        return await aio.stall(before)


CASES = {
    "receive": receive,
    "handler": receive,
    "publish": publish,
    "confirmed": confirmed,
    "round_trip": round_trip,
    "stalled": stalled,
    **aio.shared(connection, lambda client, name, body: client.publish(name, body)),
}

if __name__ == "__main__":
    common.main({name: aio.run(case) for name, case in CASES.items()}, "aiomqtt")
