"""
A process of ``bench``: its connections, and what they measure.

The process that started it writes lines to standard input: the arguments as JSON; ``go``, when all
processes are ready; and the numbers of published messages as JSON, which ends the measurement. This
process writes ``ready`` and then its :class:`Measurement` as JSON. It ends when standard input is
closed, so that it does not outlive the process that started it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, Final, Protocol

import anyio
from anyio import create_task_group
from anyio.abc import TaskStatus

from emitter_anyio import (
    ConnectError,
    ConnectionLostError,
    Emitter,
    EmitterError,
    EmitterMessage,
    EventStream,
    RequestTimeoutError,
)

from ._arguments import CommandError, UsageError
from ._bench_figures import HEADER, Latencies, Measurement, Numbering
from ._input import lines
from ._output import print_line
from ._source import connect_once, find_source

FLUSH_INTERVAL_SECONDS: Final = 0.1
"""The time between two PINGREQs that measure the latency of publishes with QoS 0."""

_POLL_SECONDS: Final = 0.02

_MESSAGES_PER_STEP: Final = 1024
"""The number of received messages that are evaluated together, which costs less than one by one."""

_BUFFER_MESSAGES: Final = 4096

_SHORTEST_SLEEP_SECONDS: Final = 0.001
"""At rates above 1,000 per second, several messages are published after each sleep."""


def channel_of_round_trip(channel: str, run: str, number: int) -> str:
    """Return the channel of a connection of ``bench rtt``, which no other one receives."""
    return f"{channel}{run}-{number}/"


class Clock:
    """
    The beginning and the end of the measurement.

    :ivar published: the numbers of published messages, when the measurement has ended
    """

    def __init__(self) -> None:
        self._go = anyio.Event()
        self._stop = anyio.Event()
        self.published: dict[str, int] = {}

    async def follow(self, commands: AsyncGenerator[bytes]) -> None:
        """Read the lines of the process that started this one, until it closes the pipe."""
        async for line in commands:
            if line == b"go":
                self._go.set()
            else:
                self.published = json.loads(line)
                self._stop.set()

    async def wait_started(self) -> None:
        """Wait until all processes are ready."""
        await self._go.wait()

    async def wait_stopped(self) -> None:
        """Wait for the end of the measurement."""
        await self._stop.wait()

    @property
    def stopped(self) -> bool:
        """Whether the measurement has ended."""
        return self._stop.is_set()


class Pace:
    """
    The times at which a connection publishes.

    :param rate: the number per second, or 0 for as many as possible
    """

    def __init__(self, clock: Clock, rate: float) -> None:
        self._clock = clock
        self._interval = 1 / rate if rate else 0.0
        self._due = time.monotonic()

    async def wait(self) -> bool:
        """Wait until the next one is due, and return whether the measurement continues."""
        if self._interval:
            delay = self._due - time.monotonic()
            self._due += self._interval
            if delay > _SHORTEST_SLEEP_SECONDS:
                with anyio.move_on_after(delay):
                    await self._clock.wait_stopped()
        return not self._clock.stopped


class Role(Protocol):
    """What a connection does."""

    async def __call__(self, number: int, *, task_status: TaskStatus[None]) -> None:
        """Connect, report that the connection is ready, and measure until the clock stops."""


class Worker:
    """
    The connections of a process.

    :param arguments: the arguments of ``bench``, with ``role``, the ``numbers`` of the connections,
        the ``run`` in hex, and the ``connection_rate``
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._source = find_source(arguments)
        self._clock = Clock()
        self._run = bytes.fromhex(arguments.run_id)
        self._padding = bytes(arguments.size - HEADER.size)
        self._latencies = Latencies()
        self._numberings: list[dict[tuple[bytes, int], Numbering]] = []
        self._published: dict[str, int] = {}
        self._messages = 0
        self._failed = 0
        self._lost = 0
        self._start = 0
        self._end = 0
        self._refusal = ""

    async def run(self, commands: AsyncGenerator[bytes]) -> None:
        """Measure, and print the result."""
        roles: dict[str, Role] = {
            "pub": self._publish,
            "sub": self._subscribe,
            "rtt": self._round_trip,
            "connect": self._connect,
        }
        role = roles[self._arguments.role]
        error = ""

        async def follow() -> None:
            await self._clock.follow(commands)
            control.cancel_scope.cancel()

        async with create_task_group() as control:
            control.start_soon(follow)
            try:
                async with create_task_group() as tasks:
                    for number in self._arguments.numbers:
                        await tasks.start(role, number)
                    print_line("ready")
            except* EmitterError as group:
                error = str(_first(group))
            print_line(json.dumps(asdict(self._measurement(error))))
            control.cancel_scope.cancel()

    def _measurement(self, error: str) -> Measurement:
        numberings = [each for by_publisher in self._numberings for each in by_publisher.values()]
        return Measurement(
            messages=self._messages + sum(each.received for each in numberings),
            start=self._start,
            end=self._end,
            latencies=self._latencies.counts(),
            failed=self._failed,
            published=self._published,
            lost=self._lost + sum(self._count_lost(each) for each in self._numberings),
            duplicates=sum(each.duplicates for each in numberings),
            reordered=sum(each.reordered for each in numberings),
            error=error or ("" if self._messages else self._refusal),
        )

    def _count_lost(self, numberings: dict[tuple[bytes, int], Numbering]) -> int:
        published = self._clock.published
        expected = {(self._run, int(name)): count for name, count in published.items()}
        lost = 0
        for publisher in {*expected, *numberings}:
            numbering = numberings.get(publisher, Numbering())
            lost += numbering.lost(expected.get(publisher))
        return lost

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.time_ns()
        self._start = min(self._start or start, start)
        try:
            yield
        finally:
            self._end = max(self._end, time.time_ns())

    def _payload(self, publisher: int, number: int) -> bytes:
        return HEADER.pack(self._run, publisher, number, time.time_ns()) + self._padding

    # ---- publishing

    async def _publish(self, number: int, *, task_status: TaskStatus[None]) -> None:
        publish = self._publish_accepted if self._arguments.qos else self._publish_unconfirmed
        async with connect_once(self._source) as emitter:
            task_status.started()
            await self._clock.wait_started()
            with self._timed():
                await publish(emitter, number)

    async def _publish_unconfirmed(self, emitter: Emitter, publisher: int) -> None:
        key, channel, pace = self._arguments.key, self._arguments.channel, self._pace()
        put, payload, number = emitter.publish, self._payload, 0
        paced = bool(self._arguments.connection_rate)

        async def publish() -> None:
            nonlocal number
            while not paced or await pace.wait():
                await put(key, channel, payload(publisher, number))
                number += 1

        try:
            await self._until_stopped(publish, partial(self._measure_flush, emitter))
            # The broker has received a message when it replies to the PINGREQ after it.
            await emitter.flush(timeout=None)
        finally:
            self._messages += number
            self._published[str(publisher)] = number

    async def _measure_flush(self, emitter: Emitter) -> None:
        while True:
            await anyio.sleep(FLUSH_INTERVAL_SECONDS)
            self._latencies.add([int(await emitter.flush(timeout=None) * 1e9)])

    async def _publish_accepted(self, emitter: Emitter, publisher: int) -> None:
        key, channel, pace = self._arguments.key, self._arguments.channel, self._pace()
        timeout, following = self._arguments.timeout, 0

        async def publish() -> None:
            nonlocal following
            while await pace.wait():
                number, following = following, following + 1
                before = time.perf_counter_ns()
                try:
                    payload = self._payload(publisher, number)
                    await emitter.publish(key, channel, payload, qos=1, timeout=timeout)
                except RequestTimeoutError:
                    self._failed += 1
                else:
                    self._messages += 1
                    self._latencies.add([time.perf_counter_ns() - before])

        try:
            async with create_task_group() as tasks:
                for _ in range(self._arguments.in_flight):
                    tasks.start_soon(publish)
        finally:
            self._published[str(publisher)] = following

    async def _until_stopped(self, *functions: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async with create_task_group() as tasks:
            for function in functions:
                tasks.start_soon(function)
            await self._clock.wait_stopped()
            tasks.cancel_scope.cancel()

    def _pace(self) -> Pace:
        return Pace(self._clock, self._arguments.connection_rate)

    # ---- receiving

    async def _subscribe(self, number: int, *, task_status: TaskStatus[None]) -> None:
        arguments = self._arguments
        numberings: dict[tuple[bytes, int], Numbering] = {}
        self._numberings.append(numberings)
        async with (
            connect_once(self._source) as emitter,
            emitter.subscribe(
                arguments.key,
                arguments.channel,
                last=0,
                buffer=_BUFFER_MESSAGES,
                overflow="block",  # the only losses are those on the way
            ) as messages,
        ):
            task_status.started()
            await self._clock.wait_started()
            async with create_task_group() as tasks:
                tasks.start_soon(self._receive, messages, numberings)
                await self._clock.wait_stopped()
                await self._wait_drained(numberings)
                tasks.cancel_scope.cancel()

    async def _receive(
        self, messages: EventStream[EmitterMessage], numberings: dict[tuple[bytes, int], Numbering]
    ) -> None:
        arrivals: list[int] = []
        payloads: list[bytes] = []
        now, arrived, append = time.time_ns, arrivals.append, payloads.append

        def evaluate() -> None:
            self._evaluate(payloads, arrivals, numberings)
            payloads.clear()
            arrivals.clear()

        async def evaluate_regularly() -> None:
            while True:
                await anyio.sleep(_POLL_SECONDS)
                evaluate()

        async with create_task_group() as tasks:
            tasks.start_soon(evaluate_regularly)
            try:
                async for message in messages:
                    arrived(now())
                    append(message.binary)
                    if len(payloads) == _MESSAGES_PER_STEP:
                        evaluate()
            finally:
                evaluate()

    def _evaluate(
        self,
        payloads: list[bytes],
        arrivals: list[int],
        numberings: dict[tuple[bytes, int], Numbering],
    ) -> None:
        """Evaluate the messages of this run, or of all runs with ``--no-publish``."""
        numbers: defaultdict[tuple[bytes, int], list[int]] = defaultdict(list)
        latencies, size, own, any_run = [], HEADER.size, self._run, not self._arguments.publish
        first = last = 0
        for payload, arrived in zip(payloads, arrivals, strict=True):
            if len(payload) < size:
                continue
            run, publisher, number, sent = HEADER.unpack_from(payload)
            if run == own or any_run:
                numbers[run, publisher].append(number)
                latencies.append(arrived - sent)
                first, last = first or arrived, arrived
        if not numbers:
            return
        self._start = self._start or first
        self._end = max(self._end, last)
        self._latencies.add(latencies)
        for publisher_, added in numbers.items():
            if publisher_ not in numberings:
                numberings[publisher_] = Numbering(added[0] if any_run else 0)
            numberings[publisher_].add(added)

    async def _wait_drained(self, numberings: dict[tuple[bytes, int], Numbering]) -> None:
        """Wait until every message has arrived, or no further one arrives."""
        before, quiet = -1, 0.0
        while self._count_lost(numberings) and quiet < self._arguments.timeout:
            await anyio.sleep(_POLL_SECONDS)
            received = sum(each.received for each in numberings.values())
            quiet = quiet + _POLL_SECONDS if received == before else 0.0
            before = received

    # ---- round trips and connections

    async def _round_trip(self, number: int, *, task_status: TaskStatus[None]) -> None:
        arguments = self._arguments
        channel = channel_of_round_trip(arguments.channel, arguments.run_id, number)
        async with (
            connect_once(self._source) as emitter,
            emitter.subscribe(arguments.key, channel, last=0) as messages,
        ):
            task_status.started()
            await self._clock.wait_started()
            with self._timed():
                pace, following = self._pace(), 0
                while await pace.wait():
                    payload = self._payload(number, following)
                    following += 1
                    before = time.perf_counter_ns()
                    await emitter.publish(arguments.key, channel, payload, qos=arguments.qos)
                    with anyio.move_on_after(arguments.timeout):
                        while (await messages.receive()).binary != payload:
                            pass  # a message that was counted as lost
                        self._messages += 1
                        self._latencies.add([time.perf_counter_ns() - before])
                        continue
                    self._lost += 1

    async def _connect(self, number: int, *, task_status: TaskStatus[None]) -> None:
        task_status.started()
        await self._clock.wait_started()
        pace = self._pace()
        with self._timed():
            while await pace.wait():
                before = time.perf_counter_ns()
                try:
                    async with connect_once(self._source):
                        self._latencies.add([time.perf_counter_ns() - before])
                        self._messages += 1
                except (ConnectError, ConnectionLostError) as exc:
                    self._failed += 1
                    self._refusal = str(exc)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _main() -> None:
    async with aclosing(lines()) as commands:
        arguments = argparse.Namespace(**json.loads(await anext(commands)))
        try:
            worker = Worker(arguments)
        except (CommandError, UsageError) as exc:
            # Such as an encrypted key, whose passphrase the first process has asked for.
            print_line(json.dumps(asdict(Measurement(error=str(exc)))))
        else:
            await worker.run(commands)


def main() -> None:
    """Run a process of ``bench`` on the backend that is its only argument."""
    # The pipe is broken if the process that started this one has given up.
    with suppress(BrokenPipeError):
        try:
            anyio.run(_main, backend=sys.argv[1])
        except BaseExceptionGroup as group:
            raise _first(group) from group
