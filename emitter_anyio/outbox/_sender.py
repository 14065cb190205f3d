"""Publishing what waits in an outbox."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import anyio
from anyio import CapacityLimiter
from anyio.lowlevel import checkpoint

from emitter_anyio._backend.tasks import Tasks
from emitter_anyio._features.pipeline import Pipeline, Sent
from emitter_anyio._net.connection import Connection
from emitter_anyio._values.backoff import Backoff
from emitter_anyio._values.channels import ChannelKey, KeySource
from emitter_anyio._values.errors import (
    ClosedError,
    ConnectionLostError,
    NotFoundError,
    RequestError,
    RequestTimeoutError,
    ServerError,
    UnauthorizedError,
)

from ._journal import Journal
from ._schedule import Fetch, Fetched, Schedule
from ._signal import Signal
from ._values import OutboxError, Stored

KeyOfChannel: TypeAlias = Callable[[str], Awaitable[str | ChannelKey]]

_MAX_IN_FLIGHT: Final = 8000
"""Emitter collects acknowledgements for up to a second, so this limits the messages per second."""
_MAX_BYTES_IN_FLIGHT: Final = 1024 * 1024
_SENDS_PER_TURN: Final = 32
_CONCURRENT_KEY_CALLS: Final = 64

_BACKOFF: Final = Backoff(initial=0.2, maximum=30)
"""The delays before a message is sent again that the broker could not process or answer."""

_LOST: Final = (ClosedError, ConnectionLostError, RequestTimeoutError)
"""The errors after which it is unknown whether the broker has accepted a message."""


@dataclass(frozen=True, slots=True)
class ChannelKeyFunction:
    """A key function of the client that calls a function with a channel."""

    function: KeyOfChannel
    channel: str

    async def __call__(self) -> str | ChannelKey:
        answer = self.function(self.channel)
        if not isinstance(answer, Awaitable):
            raise TypeError(
                f"invalid key function: it returned {type(answer).__name__}, which is not "
                "awaitable; define it with 'async def'"
            )
        return await answer


class _Flight:
    """A message that the broker has not acknowledged yet."""

    __slots__ = ("key", "message", "sent")

    def __init__(self, message: Stored, key: str, sent: Sent) -> None:
        self.message = message
        self.key = key
        self.sent = sent


class Sender:
    """
    Publishes messages in the order of each channel, with many in flight.

    One task sends messages. A second task awaits the acknowledgements, which the broker sends in
    the same order. When the connection is lost, or the broker does not reply, the messages in
    flight are sent again, from the oldest one.

    :param pipeline: publishes
    :param key: the key, or a function that returns that of a channel
    :param max_age: the age in seconds at which messages are given up
    """

    def __init__(self, pipeline: Pipeline, key: str | KeyOfChannel, max_age: float) -> None:
        self._pipeline = pipeline
        self._key = key
        self._max_age = max_age
        self._schedule = Schedule()
        self._flights: deque[_Flight] = deque()
        self._bytes_in_flight = 0
        self._connection: Connection | None = None
        """The connection on which all messages in flight were sent."""
        self._sending = False
        """Whether a message waits for queue space."""
        self._broken = False
        """Whether everything is to be sent again, when no message is in flight any more."""
        self._resume_at = -math.inf
        self._timeouts = 0
        self._failures: dict[str, tuple[int, float]] = {}
        """The number of consecutive failures of each channel, and when it is tried again."""
        self._renewed: set[int] = set()
        """Messages that are sent with a new key after they were refused with the old one."""
        self._without_key: set[str] = set()
        """The channels for which the key function is being called."""
        self._to_send = Signal()
        self._to_await = Signal()
        self._changed: anyio.Event | None = None
        self._key_calls = CapacityLimiter(_CONCURRENT_KEY_CALLS)

    def start(self, journal: Journal, tasks: Tasks) -> None:
        """Start the tasks."""
        self._journal = journal
        self._tasks = tasks
        tasks.start_soon(self._watch, name="emitter_anyio outbox: connection")
        tasks.start_soon(self._send_all, name="emitter_anyio outbox: sending")
        tasks.start_soon(self._await_all, name="emitter_anyio outbox: acknowledgements")

    def stop(self) -> None:
        """Let the client disconnect."""
        self._pipeline.hold(self, held=False)

    async def wait_sent(self) -> None:
        """Wait until all messages are accepted, or there is no connection."""
        while self._journal.waiting and self._pipeline.connection is not None:
            self._changed = anyio.Event()
            await self._changed.wait()

    def update(self) -> None:
        """Note that messages were stored or accepted, or that the connection has changed."""
        may_send = self._pipeline.connection is not None or not self._pipeline.leaving
        self._pipeline.hold(self, held=may_send and self._journal.waiting > 0)
        if self._changed is not None:
            self._changed.set()

    # Reading from disk

    def wanted(self, grows: bool) -> Fetch | None:
        """Return what to read from disk now, if anything."""
        if grows:
            self._schedule.grow()
        if self._pipeline.connection is None or self._broken:
            return None
        return self._schedule.wanted(anyio.current_time())

    def fetched(self, fetch: Fetch, fetched: Fetched | None) -> None:
        """Take what was read from disk."""
        self._schedule.add(fetch, fetched)
        self._to_send.set()

    # The connection

    async def _watch(self) -> None:
        while True:
            self.update()
            self._to_send.set()
            self._journal.wake()
            await self._pipeline.change()

    # Sending

    async def _send_all(self) -> None:
        going_on, sent = True, 0
        while going_on:
            message = self._next()
            if message is None:
                going_on = await self._wait()
                continue
            self._sending = True
            try:
                await self._send(message)
            finally:
                self._sending = False
            self._restart_if_broken()
            sent += 1
            if not sent % _SENDS_PER_TURN:
                await checkpoint()

    async def _wait(self) -> bool:
        now = anyio.current_time()
        self._journal.wake()
        until = self._resume_at if self._resume_at > now else self._schedule.next_due(now)
        return await self._to_send.wait(until - now)

    def _next(self) -> Stored | None:
        """Return the next message to send, if one may be sent now."""
        connection = self._pipeline.connection
        if (
            connection is None
            or self._broken
            or self._resume_at > anyio.current_time()
            or len(self._flights) >= _MAX_IN_FLIGHT
            or self._bytes_in_flight >= _MAX_BYTES_IN_FLIGHT
        ):
            return None
        if not self._flights:
            self._connection = connection
        return self._schedule.next()

    async def _send(self, message: Stored) -> None:
        age = max(0.0, self._journal.now() - message.published)
        expired = message.ttl is not None and age >= message.ttl
        if expired or age >= self._max_age:
            self._journal.give_up(message, "ttl has passed" if expired else "too old")
            self._finish(message)
            return
        source = self._source(message.channel)
        key = self._pipeline.known_key(source)
        if key is None:
            self._schedule.postpone(message)
            self._call_key_function(source, message.channel, None)
            return
        ttl = None if message.ttl is None else math.ceil(message.ttl - age)
        assert self._connection is not None
        try:
            sent = await self._pipeline.send(
                self._connection,
                *(key, message.channel, message.payload, ttl, message.retain, message.echo),
            )
        except _LOST:
            self._broken = True
            self._schedule.finish(message)
            return
        except ValueError as exc:
            # The key is longer than the one with which the size was checked.
            self._park(message, exc)
            return
        self._flights.append(_Flight(message, key, sent))
        self._bytes_in_flight += len(message.payload)
        self._to_await.set()

    # Acknowledgements

    async def _await_all(self) -> None:
        going_on = True
        while going_on:
            if not self._flights:
                going_on = await self._to_await.wait(math.inf)
                continue
            flight = self._flights[0]
            outcome = await _outcome(flight.sent)
            self._land(outcome)
            if isinstance(outcome, RequestTimeoutError):
                await self._give_up_waiting()
            self._restart_if_broken()
            self._to_send.set()

    def _land(self, outcome: Exception | None) -> None:
        """Take the oldest message out of flight."""
        flight = self._flights.popleft()
        message = flight.message
        self._bytes_in_flight -= len(message.payload)
        if outcome is None:
            self._timeouts = 0
            self._failures.pop(message.channel, None)
            self._journal.accept(message)
            self._finish(message)
        elif isinstance(outcome, _LOST):
            # When the schedule restarts, it reads the message again.
            self._broken = True
            self._schedule.finish(message)
        elif isinstance(outcome, ServerError):
            self._schedule.postpone(message, self._fail(message.channel, outcome))
        elif self._may_renew(message, outcome):
            self._renewed.add(message.id)
            self._schedule.postpone(message)
            self._call_key_function(self._source(message.channel), message.channel, flight.key)
        else:
            self._park(message, outcome)

    async def _give_up_waiting(self) -> None:
        """Stop waiting for acknowledgements, because the broker does not send them."""
        self._resume_at = anyio.current_time() + _BACKOFF.longest(self._timeouts)
        self._timeouts += 1
        while self._flights:
            sent = self._flights[0].sent
            self._land(await _outcome(sent) if sent.done else RequestTimeoutError())

    def _restart_if_broken(self) -> None:
        if self._broken and not (self._flights or self._sending):
            self._broken = False
            self._schedule.restart()
            self._to_send.set()

    def _finish(self, message: Stored) -> None:
        self._schedule.finish(message)
        self._renewed.discard(message.id)
        self.update()

    def _park(self, message: Stored, refusal: Exception) -> None:
        self._journal.park(message, refusal)
        self._finish(message)

    # Failures of a channel, and keys

    def _fail(self, channel: str, error: Exception) -> float:
        """Report the first failure of a channel; return the time at which to try again."""
        now = anyio.current_time()
        failures, due = self._failures.get(channel, (0, now))
        if not failures:
            self._pipeline.report(error)
        # Messages that were in flight together fail together, which counts as one failure.
        if due <= now:
            due = now + _BACKOFF.longest(failures)
            self._failures[channel] = failures + 1, due
        return due

    def _may_renew(self, message: Stored, refusal: Exception) -> bool:
        return (
            not isinstance(self._key, str)
            and isinstance(refusal, UnauthorizedError | NotFoundError)
            and message.id not in self._renewed
        )

    def _source(self, channel: str) -> KeySource:
        return self._key if isinstance(self._key, str) else ChannelKeyFunction(self._key, channel)

    def _call_key_function(self, source: KeySource, channel: str, refused: str | None) -> None:
        if channel not in self._without_key:
            self._without_key.add(channel)
            name = "emitter_anyio outbox: key function"
            self._tasks.start_soon(self._get_key, source, channel, refused, name=name)

    async def _get_key(self, source: KeySource, channel: str, refused: str | None) -> None:
        """Get the key of a channel that waits for it; its messages are then sent."""
        due = -math.inf
        try:
            async with self._key_calls:
                await self._pipeline.key_of(source, refused)
        except Exception as exc:
            error = OutboxError(
                f"cannot get a key for the messages to {channel!r} in the outbox: "
                f"{type(exc).__name__}; trying again"
            )
            error.__cause__ = exc
            due = self._fail(channel, error)
        self._without_key.discard(channel)
        self._schedule.resume(channel, due)
        self._to_send.set()
        self._journal.wake()


async def _outcome(sent: Sent) -> Exception | None:
    """Return the error with which a message was refused or lost; ``None`` if it was accepted."""
    try:
        await sent.accepted()
    except (RequestError, *_LOST) as exc:
        return exc
    return None
