"""
Measure several connections and several processes together: ``python -m benchmarks.cores``.

Without ``--url``, each connection has a separate peer of the other benchmarks. With ``--url`` and
``--secret-key``, a running broker is measured: when publishing, until it has read everything, and
when receiving, with messages that were encoded in advance. With ``--pid``, its CPU time is shown.

The messages are divided equally among the connections, and the connections among the processes.
The number of cores that the clients and the broker use shows where the rate stops: a process that
uses a whole core is the limit, or all cores of the machine together are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from threading import Thread
from typing import Final, Literal
from urllib.parse import urlsplit

import anyio

import emitter_anyio
from benchmarks import wire
from benchmarks.clients import common
from benchmarks.peer import Part
from benchmarks.running import ROOT, running_peer
from benchmarks.sizing import BrokerMeter

_CHUNK_BYTES: Final = 64 * 1024
_CONNECT: Final = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00"
_PINGREQ: Final = b"\xc0\x00"

Direction = Literal["receive", "publish"]


@dataclass(frozen=True)
class Job:
    """
    What one process does.

    :ivar urls: a URL for each connection
    :ivar first: the number of the first connection, among those of all processes
    :ivar messages: the number of messages of each connection
    :ivar silence: the seconds without a message after which the missing ones are counted as lost
    :ivar real: whether the URLs are those of a broker instead of a peer
    """

    direction: Direction
    backend: str
    urls: Sequence[str]
    key: str
    first: int
    messages: int
    payload: int
    silence: float
    real: bool


@dataclass(frozen=True)
class Done:
    """
    What one process has measured.

    :ivar start: the time at which its first message was sent or received, by the system's clock
    :ivar end: the same for its last message
    :ivar cpu: the CPU time in seconds
    """

    start: float
    end: float
    cpu: float
    messages: int


@dataclass(frozen=True)
class Result:
    """
    The figures of a run.

    :ivar rate: the messages per second of all connections together
    :ivar client_cores: the number of cores that all client processes used, on average
    :ivar broker_cores: the same for the broker or all peers; ``None`` if it is not known
    :ivar lost: the number of messages that did not arrive
    """

    rate: float
    client_cores: float
    broker_cores: float | None
    lost: int


class Work:
    """The connections of a process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._times: list[float] = []
        self._messages = 0

    async def run(self) -> None:
        """Connect, print a line, wait for a line, and print the figures."""
        job = self._job
        act = self._receive if job.direction == "receive" else self._publish
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(emitter_anyio.connect(url, reconnect=None))
                for url in job.urls
            ]
            ready = [anyio.Event() for _ in clients]
            go = anyio.Event()
            async with anyio.create_task_group() as tasks:
                for number, client in enumerate(clients):
                    tasks.start_soon(act, client, f"cores/{job.first + number}/", ready[number], go)
                for each in ready:
                    await each.wait()
                print("ready", flush=True)
                await anyio.to_thread.run_sync(sys.stdin.readline)
                before = common.processor()
                go.set()
        used = common.processor() - before
        start, end = min(self._times, default=0), max(self._times, default=0)
        print(json.dumps(asdict(Done(start, end, used, self._messages))))

    async def _receive(
        self, client: emitter_anyio.Emitter, channel: str, ready: anyio.Event, go: anyio.Event
    ) -> None:
        job = self._job
        if not job.real:
            # A peer sends as soon as it is subscribed to.
            ready.set()
            await go.wait()
            channel = wire.channel(0)
        async with client.subscribe(job.key, channel, last=0, overflow="block") as messages:
            ready.set()
            await go.wait()
            left, part = job.messages, 1
            with anyio.CancelScope() as scope:
                while left:
                    # Receive many messages before the next deadline, which takes time to set.
                    scope.deadline = anyio.current_time() + job.silence
                    for _ in range(min(left, part)):
                        await messages.receive()
                        left -= 1
                    self._times.append(time.monotonic())
                    part = 1000
            self._messages += job.messages - left

    async def _publish(
        self, client: emitter_anyio.Emitter, channel: str, ready: anyio.Event, go: anyio.Event
    ) -> None:
        job, payload = self._job, b"x" * self._job.payload
        # A peer reports there that it has read everything. For a broker, flush() does.
        done_channel = "cores/done/" if job.real else wire.DONE
        async with client.subscribe(job.key, done_channel) as done:
            ready.set()
            await go.wait()
            self._times.append(time.monotonic())
            for _ in range(job.messages):
                await client.publish(job.key, channel, payload)
            if job.real:
                await client.flush(timeout=None)
            else:
                await done.receive()
            self._times.append(time.monotonic())
            self._messages += job.messages


class Feeder:
    """A connection that publishes messages that were encoded in advance, in a thread."""

    def __init__(self, url: str, key: str, channel: str, messages: int, payload: int) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or common.HOST, parts.port or 8080))
        self._packet = wire.publish(f"{key}/{channel}", b"x" * payload)
        self._messages = messages
        self._socket.sendall(_CONNECT)
        if self._socket.recv(4) != wire.CONNACK:
            raise SystemExit("the broker has refused a connection")

    def start(self) -> None:
        Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        each = max(1, _CHUNK_BYTES // len(self._packet))
        left = self._messages
        while left > 0:
            self._socket.sendall(self._packet * min(each, left))
            left -= each
        self._socket.sendall(_PINGREQ)
        self._socket.recv(2)  # the broker has read everything
        self._socket.close()


class Measurement:
    """
    The parameters of all runs.

    :param url: the URL of a broker, or ``None`` for peers
    :param key: a key for all channels below ``cores/``
    :param pid: the process of the broker, if it is known
    :param silence: the seconds without a message after which the missing ones are counted as lost
    """

    def __init__(
        self,
        backend: str,
        messages: int,
        payload: int,
        url: str | None,
        key: str,
        pid: int | None,
        silence: float = 5.0,
    ) -> None:
        self._backend = backend
        self._messages = messages
        self._payload = payload
        self._url = url
        self._key = key
        self._pid = pid
        self._silence = silence

    def run(self, direction: Direction, processes: int, connections: int) -> Result:
        """Measure once. ``connections`` is the number of connections of all processes together."""
        messages = self._messages // connections
        with ExitStack() as stack:
            if self._url is None:
                mode = Part("blast" if direction == "receive" else "sink", messages, self._payload)
                peers = [stack.enter_context(running_peer(mode)) for _ in range(connections)]
                urls = [f"mqtt://{common.HOST}:{peer.port}" for peer in peers]
                meters = [BrokerMeter(peer.pid) for peer in peers]
            else:
                urls = [self._url] * connections
                meters = [] if self._pid is None else [BrokerMeter(self._pid)]
            each = connections // processes
            workers = [
                stack.enter_context(
                    self._running(
                        Job(
                            direction,
                            self._backend,
                            urls[first : first + each],
                            self._key,
                            first,
                            messages,
                            self._payload,
                            self._silence,
                            self._url is not None,
                        )
                    )
                )
                for first in range(0, connections, each)
            ]
            feeders = []
            if self._url is not None and direction == "receive":
                feeders = [
                    Feeder(self._url, self._key, f"cores/{number}/", messages, self._payload)
                    for number in range(connections)
                ]
            before = sum(meter.cpu() for meter in meters)
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
            for feeder in feeders:
                feeder.start()
            done = [Done(**json.loads(_line(worker))) for worker in workers]
            broker_cpu = sum(meter.cpu() for meter in meters) - before
        received = sum(each.messages for each in done)
        if not received:
            raise SystemExit("no message has arrived: check the broker and its key")
        seconds = max(each.end for each in done) - min(each.start for each in done)
        return Result(
            rate=received / seconds,
            client_cores=sum(each.cpu for each in done) / seconds,
            broker_cores=broker_cpu / seconds if meters else None,
            lost=messages * connections - received,
        )

    @contextmanager
    def _running(self, job: Job) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cores", "--job", json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        ) as process:
            try:
                assert _line(process) == "ready"
                yield process
            finally:
                process.kill()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().rstrip()
    if not line:
        raise SystemExit("a client process has failed")
    return line


def table(results: dict[tuple[Direction, int, int], list[Result]]) -> str:
    """Return the medians as a table in Markdown."""
    lines = [
        "| | processes | connections | messages/s | × | client cores | broker cores | lost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first: dict[Direction, float] = {}
    for (direction, processes, connections), runs in results.items():
        rate = statistics.median(run.rate for run in runs)
        cores = statistics.median(run.client_cores for run in runs)
        of_broker = [run.broker_cores for run in runs if run.broker_cores is not None]
        shown = f"{statistics.median(of_broker):.2f}" if of_broker else "–"
        ratio = rate / first.setdefault(direction, rate)
        lines.append(
            f"| {direction} | {processes} | {connections} | {rate:,.0f} | {ratio:.2f} "
            f"| {cores:.2f} | {shown} | {max(run.lost for run in runs):,} |"
        )
    return "\n".join(lines)


async def keygen(url: str, secret_key: str) -> str:
    async with emitter_anyio.connect(url) as emitter:
        return (await emitter.keygen(secret_key, "cores/#/", "rw")).key


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cores", description=__doc__)
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    parser.add_argument("--connections", default="1,2,4", help="default: 1,2,4")
    parser.add_argument("--processes", default="1,2", help="default: 1,2")
    parser.add_argument("--messages", type=int, default=400_000, help="default: 400000 in each run")
    parser.add_argument("--payload", type=int, default=64, help="bytes; default: 64")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3, for the median")
    parser.add_argument("--url", help="the mqtt:// URL of a broker")
    parser.add_argument(
        "--secret-key",
        default=os.environ.get("EMITTER_SECRET"),
        help="the secret key of the broker; default: EMITTER_SECRET",
    )
    parser.add_argument("--pid", type=int, help="the process of the broker, on this machine")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job is not None:
        job = Job(**json.loads(given.job))
        anyio.run(Work(job).run, backend=job.backend)
        return
    load = os.getloadavg()[0]
    key = wire.KEY
    if given.url is not None:
        if given.secret_key is None:
            parser.error("--url requires --secret-key or EMITTER_SECRET")
        key = anyio.run(keygen, given.url, given.secret_key)
    measurement = Measurement(
        given.backend, given.messages, given.payload, given.url, key, given.pid
    )
    results: dict[tuple[Direction, int, int], list[Result]] = {}
    directions: tuple[Direction, ...] = ("receive", "publish")
    for _ in range(given.rounds):
        for direction in directions:
            for processes in map(int, given.processes.split(",")):
                for connections in map(int, given.connections.split(",")):
                    if connections % processes == 0:
                        result = measurement.run(direction, processes, connections)
                        results.setdefault((direction, processes, connections), []).append(result)
                        print(direction, processes, connections, f"{result.rate:,.0f}",
                              file=sys.stderr)  # fmt: skip
    print(
        f"{os.cpu_count()} processors, Python {platform.python_version()}, load before: {load:.1f}"
    )
    print(table(results))


if __name__ == "__main__":
    main()
