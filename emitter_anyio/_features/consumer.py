"""Durable consumers: every stored message of a channel, from a cursor on."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Final

import anyio
from anyio import ClosedResourceError

from emitter_anyio._backend import Owner
from emitter_anyio._protocol.pending import Replay
from emitter_anyio._runtime.events import logger
from emitter_anyio._runtime.requester import Requester, Timeout, check_timeout
from emitter_anyio._runtime.slot import Slot
from emitter_anyio._streams import Entering, Receiver
from emitter_anyio._values import requests
from emitter_anyio._values.channels import Key, KeySource
from emitter_anyio._values.errors import ClosedError, ConnectionLostError
from emitter_anyio._values.messages import EmitterMessage, Gap, StoredMessage
from emitter_anyio._values.router import Matcher, check_delivered
from emitter_anyio._values.templates import Channel

from .forward import LOOK_BACK_REQUESTS
from .history import History, Reader
from .position import OVERLAP_SECONDS, Position, check_after
from .resumption import Subscription
from .stored import Unreadable, second_of
from .subscriptions import Subscriptions

_POLL_SECONDS: Final = 60.0
"""The time after which storage is read although no live message has arrived, or one was lost."""
_LOOK_BACK_SECONDS: Final = 60.0
"""The time after which to look for messages of nodes whose clocks are behind."""
_QUICK_SECONDS: Final = 1.0
"""
The longest pause after which a reading need not look for them.

During a longer pause, the clock of such a node might pass the position, before which messages are
unread.
"""
_MIN_PAUSE_SECONDS: Final = 0.05
_MAX_PAUSE_SECONDS: Final = 1.0
"""The pause before storage is read again, while live messages arrive that are not stored."""


class _Wakeup(Receiver["EmitterMessage | Gap"]):
    """
    A receiver of live messages, which only wake the consumer.

    :ivar lost: whether the connection was lost since the last :meth:`clear`
    :ivar closed: whether the block of the consumer was left
    """

    def __init__(self) -> None:
        self.lost: bool = False
        self.closed: bool = False
        self._ended = False
        self._error: Callable[[], Exception] | None = None
        self._event = anyio.Event()

    def push(self, item: EmitterMessage | Gap, *, extra: bool = False) -> bool:
        """Wake the consumer."""
        self._event.set()
        return True

    def note_gap(self) -> None:
        """Wake the consumer, because live messages might be missing."""
        self.lost = True
        self._event.set()

    def end(self, error: Callable[[], Exception] | None = None) -> None:
        """Wake the consumer, because no live messages will arrive."""
        self._ended, self._error = True, error
        self._event.set()

    def close(self) -> None:
        """Wake the consumer, because its block was left."""
        self.closed = True
        self._event.set()

    def clear(self) -> None:
        """Forget what has happened."""
        self.lost = False
        self._event = anyio.Event()

    async def wait(self) -> None:
        """Wait until the consumer is woken."""
        await self._event.wait()

    def check_end(self) -> None:
        """
        Raise the end, if no live messages will arrive.

        :raises StopAsyncIteration: if the client has disconnected
        :raises Exception: the error of the subscription
        """
        if self._ended:
            raise StopAsyncIteration if self._error is None else self._error()


class Consumer(AsyncIterator[StoredMessage]):
    """
    A durable consumer: the stored messages of a channel, from a cursor on, oldest first.

    It is an asynchronous iterator. After the last stored message it waits for the next one, also
    while the client reconnects, until the client disconnects. After an error or a cancellation,
    iteration can continue at the same place. Only one task at a time can iterate.
    """

    def __init__(
        self,
        channel: str,
        position: Position,
        wakeup: _Wakeup,
        make_reader: Callable[..., Reader],
        reconnected: Callable[[], Awaitable[None]],
        owner: Owner,
    ) -> None:
        self._channel = channel
        self._position = position
        self._wakeup = wakeup
        self._make_reader = make_reader
        self._reconnected = reconnected
        self._owner = owner
        self._reader = make_reader(expect_last=True, look_back=LOOK_BACK_REQUESTS)
        self._read_at = self._looked_back_at = anyio.current_time()
        self._late_noted = False
        self._complete = True
        self._reported: tuple[int, str] | None = None
        self._pause_seconds = 0.0
        self._guard = anyio.ResourceGuard("iterating over")

    def __repr__(self) -> str:
        return f"<Consumer {self._channel!r}, {'complete' if self._complete else 'incomplete'}>"

    @property
    def cursor(self) -> str:
        """
        The position after the message that was returned last, as text.

        Save it, and pass it to :meth:`Emitter.consume` as ``after`` to continue there. Before the
        first message, it is the position at which the consumer began. It has at most about 2 KB for
        each node of the broker.
        """
        return self._position.cursor

    @property
    def complete(self) -> bool:
        """
        Whether all messages that were stored after the position have been returned so far.

        Once it is ``False``, it stays so. The reason is logged: a message could not be read, a node
        of the broker might not have replied, or the message at the position has expired, so that
        later messages might have too.
        """
        return self._complete

    async def __anext__(self) -> StoredMessage:
        self._owner.check()
        with self._guard:
            while True:
                if self._wakeup.closed:
                    raise ClosedResourceError(f"consume({self._channel!r}): its block was left")
                try:
                    found = await self._read()
                except ClosedError:
                    raise StopAsyncIteration from None
                if isinstance(found, StoredMessage):
                    self._pause_seconds = 0
                    self._note_late(found)
                    return found
                if found is None:
                    await self._wait()
                else:
                    self._note_incomplete(found)

    async def _read(self) -> StoredMessage | Unreadable | None:
        while True:
            try:
                return await self._reader.next()
            except ConnectionLostError:
                await self._reconnected()

    async def _wait(self) -> None:
        """Wait for a live message, and start to read again."""
        wakeup = self._wakeup
        wakeup.check_end()
        await anyio.sleep(self._pause_seconds)
        with anyio.move_on_after(_POLL_SECONDS):
            await wakeup.wait()
        wakeup.check_end()
        reader = self._make_reader(expect_last=wakeup.lost, look_back=self._look_back())
        wakeup.clear()
        self._reader = reader
        longer = max(_MIN_PAUSE_SECONDS, 2 * self._pause_seconds)
        self._pause_seconds = min(longer, _MAX_PAUSE_SECONDS)

    def _look_back(self) -> int:
        """Return the number of requests that look for messages of nodes whose clocks are behind."""
        now = anyio.current_time()
        before, self._read_at = self._read_at, now
        if self._wakeup.lost or now - self._looked_back_at >= _LOOK_BACK_SECONDS:
            self._looked_back_at = now
            return LOOK_BACK_REQUESTS
        return int(self._position.has_several_nodes and now - before >= _QUICK_SECONDS)

    def _note_late(self, message: StoredMessage) -> None:
        newest = self._position.newest
        late = 0 if newest is None else newest.second - second_of(message)
        if late > OVERLAP_SECONDS and not self._late_noted:
            self._late_noted = True
            logger.warning(
                "consume(%r) returned a message after others that are %d s newer: the clocks of "
                "the nodes differ, or a node was cut off",
                self._channel,
                late,
            )

    def _note_incomplete(self, found: Unreadable) -> None:
        self._complete = False
        reported = found.since, found.reason
        if self._reported != reported:
            self._reported = reported
            since, until = (datetime.fromtimestamp(second, UTC) for second in found[:2])
            logger.warning(
                "consume(%r) might have missed messages stored from %s to %s: %s",
                *(self._channel, f"{since:%Y-%m-%dT%H:%M:%SZ}", f"{until:%Y-%m-%dT%H:%M:%SZ}"),
                found.reason,
            )


class Consumers:
    """
    The durable consumers of a client.

    :param slot: the current connection
    :param requester: sends requests
    :param history: reads stored messages
    :param subscriptions: subscribes to live messages
    :param matcher: how the broker matches channels
    """

    def __init__(
        self,
        slot: Slot,
        requester: Requester,
        history: History,
        subscriptions: Subscriptions,
        matcher: Matcher,
    ) -> None:
        self._slot = slot
        self._requester = requester
        self._history = history
        self._subscriptions = subscriptions
        self._matcher: Matcher = matcher

    def consume(
        self, key: Key, channel: str | Channel, after: str | StoredMessage | None, timeout: Timeout
    ) -> Entering[Consumer]:
        """Check every argument, and return an object to be entered."""
        source, channel = self._history.check_target(key, channel)
        check_delivered(channel, self._matcher)
        position = check_after(after, live=True)
        timeout = check_timeout(timeout)
        make = partial(self._enter, source, channel, position, timeout)
        return Entering(self._slot.owner, make)

    @asynccontextmanager
    async def _enter(
        self,
        key: KeySource,
        channel: str,
        position: Position | None,
        timeout: Timeout,
    ) -> AsyncGenerator[Consumer]:
        # The broker finds stored messages by prefix, with any matcher.
        exact = self._matcher == "mqtt" and not channel.endswith("#/")
        filter = f"{channel}#/" if exact else channel
        wakeup = _Wakeup()
        subscription = Subscription(key, filter, wakeup)
        add = partial(self._subscriptions.add, subscription, Replay(last=0), timeout)
        try:
            await self._requester.with_key(key, add)
            if position is None:
                position = await self._find_end(key, channel, timeout)
            else:
                await self._check_permission(key, channel, timeout)
            make_reader = partial(self._history.forward_reader, key, channel, position, timeout)
            slot = self._slot
            yield Consumer(channel, position, wakeup, make_reader, slot.reconnected, slot.owner)
        finally:
            wakeup.close()
            self._subscriptions.end(subscription)

    async def _check_permission(self, key: KeySource, channel: str, timeout: Timeout) -> None:
        def read_none(key: str) -> Awaitable[object]:
            return self._requester.request(requests.history(key, channel, last=0), timeout)

        await self._requester.with_key(key, read_none)

    async def _find_end(self, key: KeySource, channel: str, timeout: Timeout) -> Position:
        """Return the position after all messages that are stored now."""
        reader = self._history.reader(self._requester, key, channel, 1, None, None, timeout)
        newest = await reader.next()
        if newest is None:
            return Position()
        second = newest.since if isinstance(newest, Unreadable) else second_of(newest)
        position = Position(second - OVERLAP_SECONDS)
        reader = self._history.forward_reader(key, channel, position, timeout)
        while await reader.next() is not None:
            pass
        return position
