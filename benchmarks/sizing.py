"""
Measure what connections, subscriptions, streams and messages cost: ``python -m benchmarks.sizing``.

Without arguments, this measures the memory of the client, with the peer of the other benchmarks.
With ``--url``, ``--secret-key`` and ``--pid``, it also measures the memory and CPU time of a broker
on this machine. Each figure comes from a new process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final, TypeAlias

import anyio
from anyio.abc import TaskStatus

import emitter_anyio
from benchmarks.clients import common
from benchmarks.peer import Part
from benchmarks.running import ROOT, running_peer
from benchmarks.wire import KEY, channel

_COUNT: Final = 2_000
_BUFFERED: Final = 20_000
_PAYLOAD: Final = 64
_MESSAGES: Final = 20_000

Case: TypeAlias = Callable[[str, str], Awaitable[float]]


def client(url: str) -> emitter_anyio.Emitter:
    """Return a client that does not reconnect."""
    return emitter_anyio.connect(url, reconnect=None, keepalive=60)


async def connections(url: str, key: str) -> float:
    """Return the memory of an idle connection and its task, in bytes."""
    count = _COUNT // 4

    async def hold(*, task_status: TaskStatus[None]) -> None:
        async with client(url):
            task_status.started()
            await anyio.sleep_forever()

    async with client(url), anyio.create_task_group() as tasks:
        before = common.memory()
        for _ in range(count):
            await tasks.start(hold)
        weight = common.memory() - before
        tasks.cancel_scope.cancel()
    return weight / count


async def subscriptions(url: str, key: str) -> float:
    """Return the memory of an awaited subscription, in bytes."""
    async with client(url) as emitter:
        await emitter.subscribe(key, channel(_COUNT))
        before = common.memory()
        for number in range(_COUNT):
            await emitter.subscribe(key, channel(number))
        return (common.memory() - before) / _COUNT


async def streams(url: str, key: str) -> float:
    """Return the memory of a stream with a separate subscription, in bytes."""
    async with client(url) as emitter, AsyncExitStack() as stack:
        await emitter.subscribe(key, channel(_COUNT))
        before = common.memory()
        for number in range(_COUNT):
            await stack.enter_async_context(emitter.subscribe(key, channel(number)))
        return (common.memory() - before) / _COUNT


async def handlers(url: str, key: str) -> float:
    """Return the memory of a handler of messages, in bytes."""
    async with client(url) as emitter:
        before = common.memory()
        for number in range(_COUNT):
            emitter.on("message", lambda message: None, channel=channel(number))
        await anyio.sleep(common.SETTLING)
        return (common.memory() - before) / _COUNT


async def buffered(url: str, key: str) -> float:
    """Return the memory of a message in a stream that is not read, in bytes."""
    async with client(url) as emitter:
        before = common.memory()
        async with emitter.subscribe(key, channel(0), buffer=_BUFFERED) as messages:
            while messages.statistics().current_buffer_used < _BUFFERED:
                await anyio.sleep(0.05)
            return (common.memory() - before) / _BUFFERED


CLIENT_CASES: Final[dict[str, Case]] = {
    "connection": connections,
    "awaited subscription": subscriptions,
    "stream with its subscription": streams,
    "handler": handlers,
    f"buffered message of {_PAYLOAD} bytes": buffered,
}


class BrokerMeter:
    """Measures the memory and CPU time of a process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def memory(self) -> int:
        """Return its memory in bytes."""
        lines = Path(f"/proc/{self._pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

    def cpu(self) -> float:
        """Return its CPU time in seconds."""
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def broker_figures(url: str, secret_key: str, pid: int) -> dict[str, float]:
    """Return what a broker needs for each connection, subscription and message."""
    meter = BrokerMeter(pid)
    figures = {}
    async with client(url) as emitter, AsyncExitStack() as stack:
        key = (await emitter.keygen(secret_key, "size/#/", "rwsl")).key
        before = meter.memory()
        clients = [await stack.enter_async_context(client(url)) for _ in range(_COUNT // 4)]
        figures["bytes per connection"] = (meter.memory() - before) / len(clients)

        before = meter.memory()
        for number in range(_COUNT):
            await emitter.subscribe(key, f"size/{number}/")
        figures["bytes per subscription"] = (meter.memory() - before) / _COUNT

        for receivers in (0, 1, 10):
            figures[f"CPU µs per message to {receivers} clients, in a flood"] = await _messages(
                clients[:receivers], emitter, key, meter, f"size/to{receivers}/"
            )
        figures["CPU µs per stored message, in a flood"] = await _messages(
            [], emitter, key, meter, "size/stored/", ttl=600
        )
        figures["CPU µs per message to 1 client, one per ms"] = await _messages(
            clients[:1], emitter, key, meter, "size/thin/", count=_MESSAGES // 10, pause=0.001
        )
        before_cpu, start = meter.cpu(), time.perf_counter()
        await anyio.sleep(5)
        figures["CPU ms per 10 s when idle"] = (
            (meter.cpu() - before_cpu) / (time.perf_counter() - start) * 10e3
        )
    return figures


async def _messages(
    receivers: list[emitter_anyio.Emitter],
    emitter: emitter_anyio.Emitter,
    key: str,
    meter: BrokerMeter,
    to: str,
    ttl: int | None = None,
    count: int = _MESSAGES,
    pause: float | None = None,
) -> float:
    """Return the CPU time of the broker for each message, in µs."""

    async def receive(messages: emitter_anyio.EventStream[emitter_anyio.EmitterMessage]) -> None:
        left = count
        async for _ in messages:
            left -= 1
            if not left:
                break

    async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        for receiver in receivers:
            stream = receiver.subscribe(key, to, overflow="block")
            tasks.start_soon(receive, await stack.enter_async_context(stream))
        before = meter.cpu()
        for _ in range(count):
            await emitter.publish(key, to, b"x" * _PAYLOAD, ttl)
            if pause is not None:
                await anyio.sleep(pause)
        await emitter.flush()
    return (meter.cpu() - before) / count * 1e6


async def measure(name: str, url: str, key: str) -> float:
    """Return a figure of the client."""
    return await CLIENT_CASES[name](url, key)


def in_new_process(name: str, backend: str, url: str) -> float:
    """Return a figure of the client that was measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.sizing", "--case", name]
    command += ["--backend", backend, "--url", url]
    done = subprocess.run(command, capture_output=True, check=True, text=True, cwd=ROOT)
    return float(done.stdout)


def part_of(name: str) -> Part:
    """Return what the peer does for a case."""
    if name.startswith("buffered"):
        return Part(mode="blast", messages=_BUFFERED, payload=_PAYLOAD)
    return Part(mode="many")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    parser.add_argument("--url", help="a broker on this machine")
    parser.add_argument("--secret-key", help="the secret key of the broker")
    parser.add_argument("--pid", type=int, help="the process of the broker")
    parser.add_argument("--case", choices=CLIENT_CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(anyio.run(measure, given.case, given.url, KEY, backend=given.backend))
        return
    figures: dict[str, dict[str, float]] = {}
    for backend in ("asyncio", "trio"):
        figures[backend] = {}
        for name in CLIENT_CASES:
            with running_peer(part_of(name)) as peer:
                url = f"mqtt://{common.HOST}:{peer.port}"
                figures[backend][name] = round(in_new_process(name, backend, url))
    if given.pid is not None:
        found = anyio.run(broker_figures, given.url, given.secret_key, given.pid)
        figures["broker"] = {name: round(value, 1) for name, value in found.items()}
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
