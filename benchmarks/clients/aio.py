"""Cases that all clients on asyncio share."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias

from benchmarks.clients import common
from benchmarks.clients.common import Case, Figures, Job, Meter
from benchmarks.wire import channel, topic

AsyncCase: TypeAlias = Callable[[Job], Coroutine[Any, Any, Figures]]

Open: TypeAlias = Callable[[Job, int], AbstractAsyncContextManager[Any]]
"""Opens a connection with a keepalive in seconds."""

Publish: TypeAlias = Callable[[Any, str, bytes], object]
"""Publishes with QoS 0. Its result is awaited if it is awaitable."""


def run(case: AsyncCase) -> Case:
    """Return a case that runs on asyncio, with uvloop if the variant names it."""

    def on_a_loop(job: Job) -> Figures:
        if job.variant.endswith("uvloop"):
            import uvloop

            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(case(job))
        return asyncio.run(case(job))

    return on_a_loop


def shared(open_connection: Open, publish: Publish) -> dict[str, AsyncCase]:
    """Return the cases ``connect``, ``idle`` and ``connections``."""

    async def opening(job: Job) -> Figures:
        seconds, meter = list[float](), Meter()
        meter.start()
        for _ in range(job.messages):
            start = time.perf_counter()
            async with open_connection(job, 60):
                pass
            seconds.append(time.perf_counter() - start)
        meter.stop()
        return common.percentiles(seconds) | {"cpu_us": meter.figures(job.messages)["cpu_us"]}

    @asynccontextmanager
    async def many(
        job: Job, keepalive: int, act: Callable[[Any], object] | None = None
    ) -> AsyncIterator[Callable[[], None]]:
        left, opened, go = job.connections, asyncio.Event(), asyncio.Event()

        async def one() -> None:
            nonlocal left
            async with open_connection(job, keepalive) as client:
                left -= 1
                if not left:
                    opened.set()
                await go.wait()
                if act is not None:
                    await settle(act(client))
                await asyncio.Event().wait()

        tasks = [asyncio.create_task(one()) for _ in range(job.connections)]
        waiting = asyncio.create_task(opened.wait())
        await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
        yield go.set
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def idle(job: Job) -> Figures:
        idled = []
        for keepalive in (60, 1):
            async with many(job, keepalive):
                await asyncio.sleep(common.SETTLING)
                meter, before = Meter(), common.ask_peer(job.port)["pings"]
                meter.start()
                await asyncio.sleep(job.seconds)
                meter.stop()
                pings = common.ask_peer(job.port)["pings"] - before
                idled.append(common.Idling(meter.seconds, meter.processor, pings))
        return common.idle_figures(*idled)

    async def connections(job: Job) -> Figures:
        async with open_connection(job, 60):
            pass
        before, start = common.memory(), time.perf_counter()
        async with many(job, 60, lambda client: publish(client, topic(0), b"x")) as go:
            seconds = time.perf_counter() - start
            await asyncio.sleep(common.SETTLING)
            weight = common.memory() - before
            go()
            async with asyncio.timeout(30):
                while common.ask_peer(job.port)["messages"] < job.connections:
                    await asyncio.sleep(0.05)
        return {"memory_kb": weight / job.connections / 1000, "seconds": seconds}

    return {"connect": opening, "idle": idle, "connections": connections}


async def settle(result: object) -> None:
    """Await a result if it is awaitable."""
    if isinstance(result, Awaitable):
        await result


async def workers(job: Job, publish: Callable[[], Awaitable[object]]) -> Figures:
    """Publish with QoS 1 from one task for each message in flight."""

    async def work(messages: int) -> None:
        for _ in range(messages):
            await publish()

    meter = Meter()
    meter.start()
    if job.in_flight == 1:
        await work(job.messages)
    else:
        share = job.messages // job.in_flight
        await asyncio.gather(*(work(share) for _ in range(job.in_flight)))
    meter.stop()
    return meter.figures(job.messages)


async def window(job: Job, publish: Callable[[], Awaitable[Any]]) -> Figures:
    """Publish with QoS 1 from one task, for clients whose publish returns a receipt to await."""
    receipts, meter = deque[Any](), Meter()
    meter.start()
    for _ in range(job.messages):
        if len(receipts) == job.in_flight:
            await receipts.popleft().wait()
        receipts.append(await publish())
    for receipt in receipts:
        await receipt.wait()
    meter.stop()
    return meter.figures(job.messages)


async def trips(
    job: Job, there: Callable[[], Any], back: Callable[[], Awaitable[object]], awaited: bool = True
) -> Figures:
    """Publish a message and wait until it is received, again and again."""
    seconds = list[float]()
    for _ in range(job.messages):
        start = time.perf_counter()
        if awaited:
            await there()
        else:
            there()
        await back()
        seconds.append(time.perf_counter() - start)
    return common.percentiles(seconds[job.messages // 10 :])


class Bell:
    """An event that a callback sets repeatedly for one task."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rung = self._loop.create_future()

    def ring(self) -> None:
        if not self._rung.done():
            self._rung.set_result(None)

    async def wait(self) -> None:
        await self._rung
        self._rung = self._loop.create_future()


async def stall(before: int) -> Figures:
    """Wait until a client whose consumer does not read has stopped receiving."""
    busy = common.still_busy()
    while True:
        await asyncio.sleep(0.4)
        if not busy():
            return {"growth_mb": (common.peak() - before) / 1e6}


def channels(job: Job) -> list[str]:
    """Return the channels to subscribe to."""
    return [channel(number) for number in range(job.subscriptions)]
