"""Reading stored messages, page by page."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

from emitter_anyio._runtime.requester import DEFAULT, Requester, Timeout, check_timeout
from emitter_anyio._values import requests
from emitter_anyio._values.channels import (
    PLACEHOLDER_KEY,
    Key,
    KeySource,
    check_key_source,
    levels,
    unix_seconds,
)
from emitter_anyio._values.checks import check_choice, check_int
from emitter_anyio._values.errors import HistoryIncompleteError, InvalidChannelError, RequestError
from emitter_anyio._values.messages import StoredMessage
from emitter_anyio._values.templates import Channel, check_pattern

from .stored import BrokerFacts, NodeProbe, PageRequest, Reading, Reply, Unreadable

_SLOW_PAGE_SECONDS: Final = 1.9
"""A node waits 2 s for other nodes, so a page that took this long might lack their messages."""
_SLOW_PRESENCE_SECONDS: Final = 0.9
"""A node in a cluster waits 1 s for the presence of other nodes, which do not reply."""
_DEFAULT_LAST: Final = 100
"""The maximum number of messages that ``history()`` reads with ``last=None``."""


class Reader:
    """
    The execution of a :class:`Reading`.

    A request that fails or is cancelled is repeated when the next message is requested.

    :param reading: the sequence of requests and results
    :param send: sends a request to the broker, and returns the reply
    """

    def __init__(
        self, reading: Reading, send: Callable[[PageRequest | NodeProbe], Awaitable[Reply]]
    ) -> None:
        self._steps = reading.steps()
        self._send = send
        self._step = next(self._steps, None)

    async def next(self) -> StoredMessage | Unreadable | None:
        """Return the next message, newest first, or an unreadable window; ``None`` at the end."""
        if not isinstance(self._step, PageRequest | NodeProbe):
            await checkpoint()
        while isinstance(self._step, PageRequest | NodeProbe):
            self._advance(await self._send(self._step))
        step = self._step
        if step is not None:
            self._advance(None)
        return step

    def _advance(self, reply: Reply | None) -> None:
        try:
            self._step = next(self._steps) if reply is None else self._steps.send(reply)
        except StopIteration:
            self._step = None


class HistoryIterator(AsyncIterator[StoredMessage]):
    """
    An asynchronous iterator of stored messages, which are read during iteration.

    :param reader: returns the messages, newest first
    :param channel: the channel, for errors
    :param oldest_first: whether to read all messages first, and yield the oldest first
    """

    def __init__(self, reader: Reader, channel: str, oldest_first: bool) -> None:
        self._reader = reader
        self._channel = channel
        self._collected: list[StoredMessage | Unreadable] | None = [] if oldest_first else None
        self._complete = False
        self._guard = anyio.ResourceGuard("iterating over")

    async def __anext__(self) -> StoredMessage:
        with self._guard:
            found = await self._next()
        if found is None:
            raise StopAsyncIteration
        if isinstance(found, Unreadable):
            since, until = (datetime.fromtimestamp(second, UTC) for second in found[:2])
            raise HistoryIncompleteError(
                found.reason, channel=self._channel, since=since, until=until
            )
        return found

    async def _next(self) -> StoredMessage | Unreadable | None:
        if self._collected is None:
            return await self._reader.next()
        if self._complete:
            await checkpoint()
        while not self._complete:
            found = await self._reader.next()
            self._complete = found is None
            if found is not None:
                self._collected.append(found)
        return self._collected.pop() if self._collected else None


class History:
    """
    The reader of stored messages, with the facts that they reveal about the broker.

    :param requester: sends requests
    """

    def __init__(self, requester: Requester) -> None:
        self._requester = requester
        self._broker_facts = BrokerFacts()

    def read(
        self,
        key: Key,
        channel: str | Channel,
        last: int | None,
        since: datetime | float | None,
        until: datetime | float | None,
        order: str,
        timeout: Timeout,
    ) -> HistoryIterator:
        """Check every argument, and return an iterator of stored messages."""
        key = check_key_source(key)
        channel = check_pattern(channel)
        check_stored(channel)
        count = _DEFAULT_LAST if last is None else check_int("last", last, 0)
        newest = check_choice("order", order, ("oldest", "newest")) == "newest"
        timeout = check_timeout(timeout)
        first, final = unix_seconds("since", since), unix_seconds("until", until)
        text = key if isinstance(key, str) else PLACEHOLDER_KEY
        request = requests.history(text, channel, last=count, since=first, until=final)
        self._requester.check_size(request.topic.encode(), request.body, 1)
        reader = self.reader(self._requester, key, channel, count, first, final, timeout)
        return HistoryIterator(reader, channel, not newest)

    def reader(
        self,
        requester: Requester,
        key: KeySource,
        channel: str,
        last: int,
        since: int | None,
        until: int | None = None,
        timeout: Timeout = DEFAULT,
    ) -> Reader:
        """
        Make a reader of stored messages.

        :param requester: sends the requests
        :param last: the maximum number of messages
        :param since: the oldest second, in unix time; ``None`` for no bound
        :param until: the newest second, in unix time; ``None`` for no bound
        """
        level = levels(channel)[0]
        reading = Reading(last, since, until, int(time.time()), self._broker_facts, level)
        return Reader(reading, partial(_send_request, requester, key, channel, timeout))


async def _send_request(
    requester: Requester,
    key: KeySource,
    channel: str,
    timeout: Timeout,
    request: PageRequest | NodeProbe,
) -> Reply:
    if isinstance(request, PageRequest):
        return await requester.with_key(
            key, partial(_request_page, requester, channel, timeout, request)
        )
    return await requester.with_key(key, partial(_probe_nodes, requester, channel, timeout))


async def _request_page(
    requester: Requester, channel: str, timeout: Timeout, look: PageRequest, key: str
) -> Reply:
    last, since, until, before = look
    request = requests.history(key, channel, last=last, since=since, until=until, before=before)
    connection, pending = await requester.send(request)
    start = anyio.current_time()
    try:
        messages = await requester.answer(connection, pending, timeout)
    except RequestError as exc:
        if exc.status is not None:
            raise
        # Only the acknowledgement arrived, because the reply was too large for the broker to send.
        messages = None
    return Reply(messages, anyio.current_time() - start >= _SLOW_PAGE_SECONDS)


async def _probe_nodes(requester: Requester, channel: str, timeout: Timeout, key: str) -> Reply:
    request = requests.presence(key, channel, status=True, changes=None)
    # A single slow reply proves nothing: a busy broker writes to a connection once a second.
    for _ in range(2):
        connection, pending = await requester.send(replace(request, emits=False))
        start = anyio.current_time()
        try:
            await requester.answer(connection, pending, timeout)
        except RequestError:
            # Usually the key lacks the permission for presence.
            return Reply(None)
        if anyio.current_time() - start < _SLOW_PRESENCE_SECONDS:
            return Reply(None)
    return Reply(None, True)


def check_stored(channel: str) -> None:
    """
    Check that stored messages of a channel can be read.

    :raises InvalidChannelError: if the broker would find no messages
    """
    if levels(channel)[0] in ("+", "#"):
        raise InvalidChannelError(
            f"invalid channel {channel!r}: history and resume need a literal first level, because "
            "the broker looks up stored messages by it"
        )
