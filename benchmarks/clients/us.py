"""emitter_anyio through its public API; the variants are ``asyncio``, ``uvloop`` and ``trio``."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import anyio

import emitter_anyio
from benchmarks.clients import common
from benchmarks.clients.common import HOST, Figures, Job, Meter
from benchmarks.wire import DONE, KEY, channel


def connection(job: Job, keepalive: int = 60) -> emitter_anyio.Emitter:
    """Return a client."""
    scheme = ("wss" if job.ca else "ws") if job.websocket else ("mqtts" if job.ca else "mqtt")
    return emitter_anyio.connect(
        f"{scheme}://{HOST}:{job.port}",
        ssl_context=job.context,
        keepalive=keepalive,
        max_message_size=max(65536, job.payload + 1024),
    )


async def receive(job: Job) -> Figures:
    """Iterate over the first of several subscriptions."""
    meter = Meter()
    async with connection(job) as emitter, AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(emitter.subscribe(KEY, channel(number)))
            for number in range(job.subscriptions)
        ]
        size = len((await streams[0].receive()).binary)
        left = job.messages - 1
        meter.start()
        async for message in streams[0]:
            size += len(message.binary)
            left -= 1
            if not left:
                break
        meter.stop()
    common.check_size(job, size)
    return meter.figures(job.messages)


async def handler(job: Job) -> Figures:
    """Receive with a handler that is a plain function."""
    done = anyio.Event()
    countdown = common.Countdown(job, done.set)
    take = countdown.take
    emitter = connection(job)

    @emitter.on("message")
    def take_message(message: emitter_anyio.EmitterMessage) -> None:
        take(message.binary)

    async with emitter:
        for number in range(job.subscriptions):
            await emitter.subscribe(KEY, channel(number))
        await done.wait()
    return countdown.figures()


async def fan_in(job: Job) -> Figures:
    """Iterate over all subscriptions, each in a separate task."""
    done = anyio.Event()
    countdown = common.Countdown(job, done.set)
    take = countdown.take

    async def iterate(messages: AsyncIterator[emitter_anyio.EmitterMessage]) -> None:
        async for message in messages:
            take(message.binary)

    async with connection(job) as emitter, AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(anyio.create_task_group())
        for number in range(job.subscriptions):
            messages = emitter.subscribe(KEY, channel(number))
            tasks.start_soon(iterate, await stack.enter_async_context(messages))
        await done.wait()
        tasks.cancel_scope.cancel()
    return countdown.figures()


async def publish(job: Job) -> Figures:
    """Await one publish after another, and wait until the peer has received all."""
    meter, body = Meter(), job.body
    async with connection(job) as emitter, emitter.subscribe(KEY, DONE) as done:
        meter.start()
        for _ in range(job.messages):
            await emitter.publish(KEY, "bench/0000/", body)
        await done.receive()
        meter.stop()
    return meter.figures(job.messages)


async def confirmed(job: Job) -> Figures:
    """Publish with QoS 1 from one task for each message in flight."""
    meter, body = Meter(), job.body
    async with connection(job) as emitter:

        async def work(messages: int) -> None:
            for _ in range(messages):
                await emitter.publish(KEY, "bench/0000/", body, qos=1)

        meter.start()
        if job.in_flight == 1:
            await work(job.messages)
        else:
            async with anyio.create_task_group() as tasks:
                for _ in range(job.in_flight):
                    tasks.start_soon(work, job.messages // job.in_flight)
        meter.stop()
    return meter.figures(job.messages)


async def round_trip(job: Job) -> Figures:
    """Publish a message and wait until it is received, again and again."""
    body, seconds, meter = job.body, list[float](), Meter()
    async with connection(job) as emitter, emitter.subscribe(KEY, channel(0)) as messages:
        meter.start()
        for _ in range(job.messages):
            start = time.perf_counter()
            await emitter.publish(KEY, "bench/0000/", body)
            await messages.receive()
            seconds.append(time.perf_counter() - start)
        meter.stop()
    used = {"cpu_us": meter.figures(job.messages)["cpu_us"]}
    return common.percentiles(seconds[job.messages // 10 :]) | used


async def opening(job: Job) -> Figures:
    """Open and close one connection after another."""
    seconds, meter = list[float](), Meter()
    meter.start()
    for _ in range(job.messages):
        start = time.perf_counter()
        async with connection(job):
            pass
        seconds.append(time.perf_counter() - start)
    meter.stop()
    return common.percentiles(seconds) | {"cpu_us": meter.figures(job.messages)["cpu_us"]}


@asynccontextmanager
async def many(
    job: Job, keepalive: int, act: Callable[[emitter_anyio.Emitter], Awaitable[None]] | None = None
) -> AsyncIterator[Callable[[], None]]:
    """Open many connections in parallel, each in a separate task."""
    left, opened, go = job.connections, anyio.Event(), anyio.Event()

    async def one() -> None:
        nonlocal left
        async with connection(job, keepalive) as emitter:
            left -= 1
            if not left:
                opened.set()
            await go.wait()
            if act is not None:
                await act(emitter)
            await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        for _ in range(job.connections):
            tasks.start_soon(one)
        await opened.wait()
        yield go.set
        tasks.cancel_scope.cancel()


async def idle(job: Job) -> Figures:
    """Measure idle connections, first without and then with pings."""
    idled = []
    for keepalive in (60, 1):
        async with many(job, keepalive):
            await anyio.sleep(common.SETTLING)
            meter, before = Meter(), common.ask_peer(job.port)["pings"]
            meter.start()
            await anyio.sleep(job.seconds)
            meter.stop()
            pings = common.ask_peer(job.port)["pings"] - before
            idled.append(common.Idling(meter.seconds, meter.processor, pings))
    return common.idle_figures(*idled)


async def connections(job: Job) -> Figures:
    """Open many connections in parallel, measure their memory, and publish on each."""
    async with connection(job):
        pass
    before, start = common.memory(), time.perf_counter()
    async with many(job, 60, lambda emitter: emitter.publish(KEY, channel(0), b"x")) as go:
        seconds = time.perf_counter() - start
        await anyio.sleep(common.SETTLING)
        weight = common.memory() - before
        go()
        with anyio.fail_after(30):
            while common.ask_peer(job.port)["messages"] < job.connections:
                await anyio.sleep(0.05)
    return {"memory_kb": weight / job.connections / 1000, "seconds": seconds}


async def stalled(job: Job) -> Figures:
    """Read one of two streams of the same messages, and never read the other one."""
    async with (
        connection(job) as emitter,
        emitter.subscribe(KEY, channel(0)) as unread,
    ):
        before = common.memory()
        async with emitter.subscribe(KEY, "bench/", last=0) as read:
            received = 0
            with anyio.move_on_after(60):
                async for _ in read:
                    received += 1
                    if received == job.messages:
                        break
        growth = common.peak() - before
        kept = unread.statistics()
    return {
        "growth_mb": growth / 1e6,
        "uncounted": job.messages - kept.dropped - kept.current_buffer_used,
        "lost_by_healthy": job.messages - received,
    }


def run(case: Callable[[Job], Awaitable[Figures]], job: Job) -> Figures:
    """Run a case on the event loop of the variant."""
    if job.variant == "trio":
        return anyio.run(case, job, backend="trio")
    return anyio.run(case, job, backend_options={"use_uvloop": job.variant == "uvloop"})


CASES = {
    "receive": receive,
    "handler": handler,
    "fan_in": fan_in,
    "publish": publish,
    "confirmed": confirmed,
    "round_trip": round_trip,
    "connect": opening,
    "idle": idle,
    "connections": connections,
    "stalled": stalled,
}

if __name__ == "__main__":
    common.main({name: partial(run, case) for name, case in CASES.items()}, "emitter_anyio")
