"""
Kill a program with an outbox at random moments, and check that nothing is lost.

``python -m tests.soak.outbox --help`` lists the options. Each round starts a process that publishes
numbers through an outbox and prints those that ``publish()`` has accepted, and ends it with
SIGKILL. The broker drops connections. At the end, every number that was printed must have
arrived, and in each channel, each number must have arrived first after all smaller ones.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from collections import defaultdict
from itertools import count
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import Process
from anyio.lowlevel import checkpoint
from anyio.streams.buffered import BufferedByteReceiveStream

from emitter_anyio import Backoff, EmitterMessage, connect
from emitter_anyio.outbox import Outbox
from emitter_anyio.testing import Broker
from tests.support.command import open_process

CHANNELS: Final = 4
AT_ONCE: Final = 8
"""The number of messages that are published together in each channel."""
NUMBERS_PER_ROUND: Final = 1_000_000
CLIENT_ID: Final = "killed"
STARTING_SECONDS: Final = 0.5
"""The longest time for which a process may start before it is killed, in some rounds."""
RUNNING_SECONDS: Final = 0.7
"""The longest time for which a process may publish before it is killed."""


class Check:
    """What was accepted by ``publish()``, and what has arrived."""

    def __init__(self) -> None:
        self.accepted: set[tuple[str, int]] = set()
        self.arrived: dict[str, list[int]] = defaultdict(list)

    def receive(self, message: EmitterMessage) -> None:
        """Record a message."""
        self.arrived[message.channel].append(message.as_object())

    @property
    def lost(self) -> set[tuple[str, int]]:
        """What was accepted and has not arrived."""
        return self.accepted - {(c, n) for c, numbers in self.arrived.items() for n in numbers}

    @property
    def duplicates(self) -> int:
        """The number of messages that have arrived again."""
        return sum(len(numbers) - len(set(numbers)) for numbers in self.arrived.values())

    @property
    def disordered(self) -> list[tuple[str, int, int]]:
        """Numbers that have arrived for the first time after a larger one."""
        found = []
        for channel, numbers in self.arrived.items():
            largest, seen = -1, set()
            for number in numbers:
                if number not in seen and number < largest:
                    found.append((channel, number, largest))
                seen.add(number)
                largest = max(largest, number)
        return found

    def breaches(self) -> list[str]:
        """Return what is wrong."""
        found = [f"lost: {lost}" for lost in sorted(self.lost)]
        return found + [f"out of order: {each}" for each in self.disordered]


async def publish(path: str, url: str, key: str, first: int) -> None:
    """Publish numbers in all channels until killed, and print those that are accepted."""

    async def one(channel: str, number: int) -> None:
        await box.publish(channel, number)
        os.write(1, f"{channel} {number}\n".encode())

    async def many(channel: str) -> None:
        for start in count(first, AT_ONCE):
            async with anyio.create_task_group() as tasks:
                for number in range(start, start + AT_ONCE):
                    tasks.start_soon(one, channel, number)
                    await checkpoint()  # so that the task runs before the next one

    emitter = connect(
        url, client_id=CLIENT_ID, retry_first_connect=True, reconnect=Backoff(maximum=0.1)
    )
    async with Outbox(path, emitter, key) as box, anyio.create_task_group() as tasks:
        for number in range(CHANNELS):
            tasks.start_soon(many, f"kill/{number}/")
        await tasks.start(emitter.run)


class Kills:
    """
    A run.

    :param path: the file of the outbox
    :param backend: the backend of the processes
    :param rounds: the number of processes to kill
    :param seed: determines when they are killed
    """

    def __init__(self, path: Path, backend: str, rounds: int, seed: int) -> None:
        self.check = Check()
        self.corrupt: list[str] = []
        self.drops = 0
        self._path = path
        self._backend = backend
        self._rounds = rounds
        self._random = random.Random(seed)

    async def __call__(self) -> None:
        """Run all rounds, and wait until everything that waits has arrived."""
        async with Broker() as broker, connect(broker.url) as emitter:
            key = broker.keygen("kill/#/", "rw")
            emitter.on("message", self.check.receive, overflow="block")
            await emitter.subscribe(key, "kill/")
            for number in range(self._rounds):
                await self._round(broker, key, number)
            async with Outbox(self._path, emitter, key) as box:
                if box.set_aside is not None:
                    self.corrupt.append(str(box.set_aside))
                while box.statistics().waiting:  # noqa: ASYNC110 - the figures have no event
                    await anyio.sleep(0.01)
                if parked := await box.parked():
                    self.corrupt.append(f"parked: {parked}")
            await emitter.flush()

    async def _round(self, broker: Broker, key: str, number: int) -> None:
        arguments = (self._backend, str(self._path), broker.url, key)
        first = str(number * NUMBERS_PER_ROUND)
        async with open_process("-m", "tests.soak.outbox", *arguments, first) as process:
            async with anyio.create_task_group() as tasks:
                started = anyio.Event()
                tasks.start_soon(self._read, process, started)
                if self._random.random() < 0.2:
                    await anyio.sleep(self._random.uniform(0, STARTING_SECONDS))
                else:
                    await started.wait()
                    until = anyio.current_time() + self._random.uniform(0, RUNNING_SECONDS)
                    while anyio.current_time() < until:
                        await anyio.sleep(self._random.uniform(0, 0.3))
                        await self._drop(broker)
                os.kill(process.pid, signal.SIGKILL)
                await process.wait()

    async def _drop(self, broker: Broker) -> None:
        if any(client.client_id == CLIENT_ID for client in broker.clients):
            self.drops += 1
            await broker.drop(CLIENT_ID)

    async def _read(self, process: Process, started: anyio.Event) -> None:
        assert process.stdout is not None
        lines = BufferedByteReceiveStream(process.stdout)
        async with lines:
            try:
                while True:
                    line = await lines.receive_until(b"\n", 1000)
                    channel, number = line.decode().split()
                    self.check.accepted.add((channel, int(number)))
                    started.set()
            except (anyio.EndOfStream, anyio.IncompleteRead):
                started.set()

    def breaches(self) -> list[str]:
        """Return what is wrong."""
        return [*self.check.breaches(), *self.corrupt]


def main() -> int:
    """Run on the selected backends."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.outbox", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="default: any")
    parser.add_argument("--backend", choices=["asyncio", "trio", "both"], default="both")
    options = parser.parse_args()
    backends = ["asyncio", "trio"] if options.backend == "both" else [options.backend]
    print(f"--seed {options.seed}", flush=True)
    failed = False
    for backend in backends:
        with tempfile.TemporaryDirectory() as directory:
            kills = Kills(Path(directory, "out.db"), backend, options.rounds, options.seed)
            anyio.run(kills)
        check, breaches = kills.check, kills.breaches()
        print(f"{backend}: {options.rounds} kills, {kills.drops} dropped connections")
        print(f"  {len(check.accepted)} accepted")
        arrived = sum(map(len, check.arrived.values()))
        print(f"  {arrived} arrived, {check.duplicates} of them again")
        print(f"  breaches: {len(breaches)}")
        for breach in breaches[:40]:
            print(f"    {breach}")
        failed = failed or bool(breaches)
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) == 6 and sys.argv[1] in ("asyncio", "trio"):
        backend, path, url, key, first = sys.argv[1:]
        anyio.run(publish, path, url, key, int(first), backend=backend)
    else:
        sys.exit(main())
