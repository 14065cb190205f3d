"""
Open many connections and measure what they cost while they are idle: ``python -m benchmarks.idle``.

Without ``--url``, they connect to the peer of the other benchmarks. By default, it opens as many as
the file descriptors of a process and the local ports permit. A local port is used once for each
address, so with ``--sources 127.0.0.2,127.0.0.3`` the ports of these addresses are used in turn.
Such connections come from a ``connectable``, and their cost differs a little.

``--no-gc`` turns Python's garbage collector off while connections are opened. Otherwise, it takes
most of that time, because it looks at all connections again and again.

With ``--churn``, connections are then closed and replaced for that many seconds. Memory, objects
and file descriptors are printed ten times. Objects and descriptors must not grow.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
import resource
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import anyio
from anyio.abc import ByteStream, ByteStreamConnectable

import emitter_anyio
from benchmarks.clients import common
from benchmarks.peer import Part
from benchmarks.running import running_peer
from benchmarks.sizing import BrokerMeter

_RESERVED: Final = 100
"""The number of descriptors and of ports that are left for other purposes."""

_CONCURRENT: Final = 200
"""The number of connections that are opened at the same time."""

_PINGS_PER_SECOND: Final = 1_000
_QUIET_KEEPALIVE: Final = 60
_SAMPLES: Final = 10


@dataclass(frozen=True)
class SourceAddress(ByteStreamConnectable):
    """Connects from a local address."""

    host: str
    port: int
    source: str

    async def connect(self) -> ByteStream:
        return await anyio.connect_tcp(self.host, self.port, local_host=self.source)


class Fleet:
    """
    Many connections, each in a separate task.

    :param sources: the local addresses to use in turn; empty for the system's choice
    """

    def __init__(self, url: str, count: int, keepalive: int, sources: Sequence[str] = ()) -> None:
        self._url = url
        self._keepalive = keepalive
        self._sources = sources
        self._next_source = cycle(sources)
        self._opening = anyio.CapacityLimiter(_CONCURRENT)
        self._opened = anyio.Semaphore(0)
        self._close = [anyio.Event() for _ in range(count)]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Open all connections, and close them when the block is left."""
        async with anyio.create_task_group() as tasks:
            for number in range(len(self._close)):
                tasks.start_soon(self._keep_open, number)
            for _ in self._close:
                await self._opened.acquire()
            yield
            tasks.cancel_scope.cancel()

    async def replace(self, number: int) -> None:
        """Close a connection, and wait until a new one is open in its place."""
        close, self._close[number] = self._close[number], anyio.Event()
        close.set()
        await self._opened.acquire()

    async def _keep_open(self, number: int) -> None:
        while True:
            async with AsyncExitStack() as stack:
                async with self._opening:
                    await stack.enter_async_context(self._client())
                self._opened.release()
                await self._close[number].wait()

    def _client(self) -> emitter_anyio.Emitter:
        """Return a client that does not reconnect: a lost connection ends the measurement."""
        connect = partial(
            emitter_anyio.connect,
            reconnect=None,
            keepalive=self._keepalive,
            connect_timeout=60,  # collecting the garbage of many connections takes seconds
        )
        if not self._sources:
            return connect(self._url)
        parts = urlsplit(self._url)
        source = SourceAddress(parts.hostname or "", parts.port or 8080, next(self._next_source))
        return connect(connectable=source)


def most_connections(sources: int) -> int:
    """Return how many connections one process can open to one address."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = (high - low + 1) * max(1, sources)
    return min(descriptors, ports) - _RESERVED


def descriptors() -> int:
    """Return the number of open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


@dataclass(frozen=True)
class Options:
    """
    What to measure.

    :ivar count: the number of connections
    :ivar seconds: the length of each measurement
    :ivar sources: the local addresses; empty for the system's choice
    :ivar peer: the port of the peer, which counts pings; ``None`` for a broker
    :ivar broker: measures the broker or the peer, if its process is known
    """

    url: str
    count: int
    seconds: float
    sources: Sequence[str]
    peer: int | None
    broker: BrokerMeter | None


async def measure(options: Options) -> dict[str, float]:
    """Measure idle connections without pings, then with pings, and then churn."""
    figures: dict[str, float] = {"connections": options.count}
    # What the first connection imports and creates is not counted.
    async with Fleet(options.url, 1, _QUIET_KEEPALIVE, options.sources[:1]).open():
        pass
    before, used, start = common.memory(), common.processor(), time.perf_counter()
    broker_before = options.broker.memory() if options.broker else 0
    async with Fleet(options.url, options.count, _QUIET_KEEPALIVE, options.sources).open():
        figures["seconds to open all"] = time.perf_counter() - start
        figures["CPU µs to open a connection"] = (common.processor() - used) / options.count * 1e6
        print("all connections are open", file=sys.stderr)
        await anyio.sleep(common.SETTLING)
        figures["bytes per connection"] = (common.memory() - before) / options.count
        if options.broker:
            grown = options.broker.memory() - broker_before
            figures["bytes per connection, of the broker"] = grown / options.count
        quiet = await idling(options, _QUIET_KEEPALIVE)
    keepalive = min(60, max(1, math.ceil(options.count / _PINGS_PER_SECOND)))
    async with Fleet(options.url, options.count, keepalive, options.sources).open():
        print("all connections are open, with pings", file=sys.stderr)
        # The first pings are due together, because the connections were opened together.
        await anyio.sleep(keepalive + common.SETTLING)
        pinging = await idling(options, keepalive)
    idle, ping = split(quiet, pinging)
    figures["pings per second"] = pinging.pings / pinging.seconds
    figures["CPU µs per ping"] = ping * 1e6
    figures["CPU µs per second and idle connection, without pings"] = idle / options.count * 1e6
    return figures


def split(quiet: common.Idling, pinging: common.Idling) -> tuple[float, float]:
    """
    Return the CPU time of all connections per second without pings, and that of a ping.

    Both measurements contain some of each: pings are due in the first one too, if it took a minute
    to open the connections.
    """
    determinant = quiet.seconds * pinging.pings - pinging.seconds * quiet.pings
    idle = (quiet.processor * pinging.pings - pinging.processor * quiet.pings) / determinant
    return idle, (pinging.processor - idle * pinging.seconds) / pinging.pings


async def churn(options: Options, seconds: float, rate: float) -> None:
    """Close and replace connections at a rate per second, and print what must not grow."""
    fleet = Fleet(options.url, options.count, _QUIET_KEEPALIVE, options.sources)
    async with fleet.open():
        gc.enable()
        start, replaced = anyio.current_time(), 0
        for sample in range(_SAMPLES + 1):
            figures = {
                "connections replaced": replaced,
                "bytes": common.memory(),  # collects the garbage
                "objects": len(gc.get_objects()),
                "descriptors": descriptors(),
            }
            words = ", ".join(f"{number:,} {name}" for name, number in figures.items())
            print(f"{anyio.current_time() - start:6.0f} s: {words}", flush=True)
            end = start + seconds * (sample + 1) / _SAMPLES
            while sample < _SAMPLES and anyio.current_time() < end:
                await fleet.replace(random.randrange(options.count))
                replaced += 1
                await anyio.sleep_until(start + replaced / rate)


async def idling(options: Options, keepalive: int) -> common.Idling:
    """Measure for at least one period of pings, if there are any."""
    seconds = options.seconds
    if keepalive < _QUIET_KEEPALIVE:
        seconds = keepalive * math.ceil(seconds / keepalive)
    meter, before = common.Meter(), pings(options.peer)
    meter.start()
    await anyio.sleep(seconds)
    meter.stop()
    sent = pings(options.peer) - before
    if options.peer is None and keepalive < _QUIET_KEEPALIVE:
        sent = options.count * meter.seconds / keepalive  # a broker does not report them
    return common.Idling(meter.seconds, meter.processor, sent)


def pings(peer: int | None) -> float:
    return 0 if peer is None else common.ask_peer(peer)["pings"]


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the peer inherits it
    parser = argparse.ArgumentParser(prog="python -m benchmarks.idle", description=__doc__)
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    parser.add_argument("--connections", type=int, help="default: as many as possible")
    parser.add_argument("--seconds", type=float, default=10, help="default: 10, for each figure")
    parser.add_argument("--sources", default="", help="local addresses, separated by commas")
    parser.add_argument(
        "--no-gc", action="store_true", help="open connections without the garbage collector"
    )
    parser.add_argument("--churn", type=float, default=0, help="seconds of churn; default: 0")
    parser.add_argument("--rate", type=float, default=50, help="default: 50 replaced per second")
    parser.add_argument("--url", help="the mqtt:// URL of a broker")
    parser.add_argument("--pid", type=int, help="the process of the broker, on this machine")
    given = parser.parse_args()
    sources = [source for source in given.sources.split(",") if source]
    count = given.connections or most_connections(len(sources))
    load = os.getloadavg()[0]
    print(
        f"{os.cpu_count()} processors, Python {platform.python_version()}, load before: {load:.1f}"
    )
    with ExitStack() as stack:
        url, pid, port = given.url, given.pid, None
        if url is None:
            peer = stack.enter_context(running_peer(Part("many")))
            url, pid, port = f"mqtt://{common.HOST}:{peer.port}", peer.pid, peer.port
        meter = None if pid is None else BrokerMeter(pid)
        if given.no_gc:
            gc.disable()
        options = Options(url, count, given.seconds, sources, port, meter)
        figures = anyio.run(measure, options, backend=given.backend)
        rounded = {name: round(value, 2) for name, value in figures.items()}
        print(json.dumps(rounded, indent=2, ensure_ascii=False))
        if given.churn:
            anyio.run(churn, options, given.churn, given.rate, backend=given.backend)


if __name__ == "__main__":
    main()
