"""Reading stored messages, page by page."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Final, TypeAlias

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
from emitter_anyio._values.checks import MAX_INT32, check_choice, check_optional_int
from emitter_anyio._values.errors import HistoryIncompleteError, InvalidChannelError, RequestError
from emitter_anyio._values.messages import StoredMessage
from emitter_anyio._values.templates import Channel, check_pattern

from .forward import ForwardReading
from .position import Position, check_after
from .stored import (
    BrokerFacts,
    NodeProbe,
    PageRequest,
    Reading,
    Reply,
    Steps,
    Unreadable,
    advance,
)

_SLOW_PAGE_SECONDS: Final = 1.9
"""A node waits 2 s for other nodes, so a page that took this long might lack their messages."""
_SLOW_PRESENCE_SECONDS: Final = 0.9
"""A node in a cluster waits 1 s for the presence of other nodes, which do not reply."""
_DEFAULT_LAST: Final = 100
"""The maximum number of messages that ``history()`` reads with ``last=None``."""

Send: TypeAlias = Callable[[PageRequest | NodeProbe], Awaitable[Reply]]
"""A function that sends a request to the broker, and returns the reply."""


class Reader:
    """
    The execution of a sequence of requests and results.

    A request that fails or is cancelled is repeated when the next message is requested.

    :param steps: the sequence
    :param send: sends the requests
    """

    def __init__(self, steps: Steps[None], send: Send) -> None:
        self._steps = steps
        self._send = send
        self._step = advance(steps)

    def send_through(self, send: Send) -> None:
        """Send further requests with another function, such as one for a new connection."""
        self._send = send

    async def next(self) -> StoredMessage | Unreadable | None:
        """Return the next message or unreadable window; ``None`` at the end."""
        if not isinstance(self._step, PageRequest | NodeProbe):
            await checkpoint()
        while isinstance(self._step, PageRequest | NodeProbe):
            self._step = advance(self._steps, await self._send(self._step))
        step = self._step
        if step is not None:
            self._step = advance(self._steps)
        return step


class HistoryIterator(AsyncIterator[StoredMessage]):
    """
    An asynchronous iterator of stored messages, which are read during iteration.

    :param reader: returns the messages
    :param channel: the channel, for errors
    """

    def __init__(self, reader: Reader, channel: str) -> None:
        self._reader = reader
        self._channel = channel
        self._guard = anyio.ResourceGuard("iterating over")

    async def __anext__(self) -> StoredMessage:
        with self._guard:
            found = await self._reader.next()
        if found is None:
            raise StopAsyncIteration
        if isinstance(found, Unreadable):
            since, until = (datetime.fromtimestamp(second, UTC) for second in found[:2])
            raise HistoryIncompleteError(
                found.reason, channel=self._channel, since=since, until=until
            )
        return found


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
        after: str | StoredMessage | None,
        order: str,
        timeout: Timeout,
    ) -> HistoryIterator:
        """Check every argument, and return an iterator of stored messages."""
        source, channel = self.check_target(key, channel)
        count = check_optional_int("last", last)
        newest = check_choice("order", order, ("oldest", "newest")) == "newest"
        timeout = check_timeout(timeout)
        first, final = unix_seconds("since", since), unix_seconds("until", until)
        position = None if after is None else check_after(after, live=False)
        if position is not None and (newest or first is not None):
            raise ValueError(
                "cannot use after with since or order='newest': after reads forward from a position"
            )
        number = _DEFAULT_LAST if count is None else count
        if newest:
            reader = self.reader(self._requester, source, channel, number, first, final, timeout)
        elif position is None:
            reading = self._forward(channel, Position(first), final)
            reader = self._reader(reading.read_newest(number), source, channel, timeout)
        else:
            reading = self._forward(channel, position, final)
            steps = reading.read() if count is None else reading.read(count)
            reader = self._reader(steps, source, channel, timeout)
        return HistoryIterator(reader, channel)

    def check_target(self, key: Key, channel: str | Channel) -> tuple[KeySource, str]:
        """Check the key and the channel whose stored messages are to be read."""
        source = check_key_source(key)
        channel = check_pattern(channel)
        check_stored(channel)
        text = source if isinstance(source, str) else PLACEHOLDER_KEY
        request = requests.history(text, channel, last=MAX_INT32, since=MAX_INT32, until=MAX_INT32)
        self._requester.check_size(request.topic.encode(), request.body, 1)
        return source, channel

    def forward_reader(
        self,
        key: KeySource,
        channel: str,
        position: Position,
        timeout: Timeout,
        *,
        expect_last: bool = False,
        look_back: int = 0,
    ) -> Reader:
        """
        Make a reader of the stored messages after a position, oldest first.

        :param position: moved by each message that the reader returns
        :param expect_last: whether to report it if the message at the position has expired
        :param look_back: the number of requests that look for earlier messages that are unread
        """
        reading = self._forward(channel, position, None)
        steps = reading.read(expect_last=expect_last, look_back=look_back)
        return self._reader(steps, key, channel, timeout)

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
        return Reader(reading.steps(), self.sender(requester, key, channel, timeout))

    def sender(
        self, requester: Requester, key: KeySource, channel: str, timeout: Timeout = DEFAULT
    ) -> Send:
        """Make the function that sends the requests of a reader."""
        return partial(_send_request, requester, key, channel, timeout)

    def _forward(self, channel: str, position: Position, until: int | None) -> ForwardReading:
        level = levels(channel)[0]
        return ForwardReading(position, until, int(time.time()), self._broker_facts, level)

    def _reader(self, steps: Steps[None], key: KeySource, channel: str, timeout: Timeout) -> Reader:
        return Reader(steps, self.sender(self._requester, key, channel, timeout))


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
            f"invalid channel {channel!r}: history, resume and consume need a literal first level, "
            "because the broker looks up stored messages by it"
        )
