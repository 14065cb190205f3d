"""
Measure the outbox beside plain publishes with QoS 1.

``python -m benchmarks.outbox`` measures with the development broker, and ``--url URL --secret KEY``
with a real Emitter. The file is on the disk of ``--directory``, whose ``fsync()`` determines the
first rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Final

import anyio

from emitter_anyio import connect
from emitter_anyio.outbox import Outbox
from emitter_anyio.testing import Broker

RUNS: Final = 5
PAYLOAD: Final = b"x" * 64
CHANNEL: Final = "bench/"

Publish = Callable[[], Awaitable[None]]


async def publish_all(publish: Publish, count: int, tasks: int) -> float:
    """Publish messages in several tasks, and return how many per second."""

    async def some() -> None:
        for _ in range(count // tasks):
            await publish()

    start = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(tasks):
            group.start_soon(some)
    return count / (time.perf_counter() - start)


async def drain(box: Outbox, count: int, start: float) -> float:
    """Wait until no message waits, and return how many were accepted per second."""
    while box.statistics().waiting:
        await anyio.sleep(0.001)
    return count / (time.perf_counter() - start)


async def measure(options: argparse.Namespace) -> dict[str, float]:
    """Measure each row once."""
    rows: dict[str, float] = {}
    async with AsyncExitStack() as stack:
        url, secret = options.url, options.secret
        if url is None:
            broker = await stack.enter_async_context(Broker())
            url, secret = broker.url, broker.secret_key
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory))
        path = Path(directory, "out.db")
        async with connect(url) as emitter:
            key = (await emitter.keygen(secret, CHANNEL, "rw")).key

            async def plain() -> None:
                await emitter.publish(key, CHANNEL, PAYLOAD, qos=1)

            rows["publish(qos=1), 1000 tasks"] = await publish_all(plain, 20_000, 1000)

        offline = connect(url)
        async with Outbox(path, offline, key) as box:

            async def store() -> None:
                await box.publish(CHANNEL, PAYLOAD)

            rows["to disk, 1 task"] = await publish_all(store, 100, 1)
            rows["to disk, 100 tasks"] = await publish_all(store, 5_000, 100)
            rows["to disk, 1000 tasks"] = await publish_all(store, 20_000, 1000)
            count = box.statistics().waiting
            start = time.perf_counter()
            async with offline:
                rows["from disk to the broker"] = await drain(box, count, start)
                start = time.perf_counter()
                await publish_all(store, 20_000, 1000)
                rows["through the outbox, 1000 tasks"] = await drain(box, 20_000, start)
    return rows


def main() -> None:
    """Print the medians of several runs on both backends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outbox", description=__doc__)
    parser.add_argument("--url", help="the URL of an Emitter; default: the development broker")
    parser.add_argument("--secret", help="its secret key")
    parser.add_argument("--directory", help="where to create the file")
    parser.add_argument("--runs", type=int, default=RUNS, help="default: %(default)s")
    options = parser.parse_args()
    for backend in ("asyncio", "trio"):
        runs = [anyio.run(measure, options, backend=backend) for _ in range(options.runs)]
        print(f"{backend}, messages per second (median of {options.runs} runs)")
        for row in runs[0]:
            print(f"  {row:32} {median(run[row] for run in runs):10,.0f}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
