"""Reading back what the broker has stored, page by page."""

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
    check_channel,
    check_key_source,
    levels,
    unix_seconds,
)
from emitter_anyio._values.checks import check_choice, check_int
from emitter_anyio._values.errors import HistoryIncompleteError, InvalidChannelError, RequestError
from emitter_anyio._values.messages import StoredMessage

from .stored import Answer, Census, Known, Look, Reading, Unread

_PAGE_SECONDS: Final = 1.9
"""A node waits 2 s for others that do not answer; a page that took this long may lack theirs."""
_CENSUS_SECONDS: Final = 0.9
"""A node that has others waits 1 s for what they do not say of presence."""
_DEFAULT_LAST: Final = 100
"""The most messages that ``history()`` gives unless ``last`` is given."""


class Reader:
    """
    Carries out a reading.

    A look that fails, or is cancelled, is made again when the next message is wanted.

    :param reading: what to ask for
    :param ask: asks the broker
    """

    def __init__(self, reading: Reading, ask: Callable[[Look | Census], Awaitable[Answer]]) -> None:
        self._steps = reading.steps()
        self._ask = ask
        self._step = next(self._steps, None)

    async def next(self) -> StoredMessage | Unread | None:
        """Give the next message, the newest first, or what cannot be read; ``None`` at the end."""
        if not isinstance(self._step, Look | Census):
            await checkpoint()
        while isinstance(self._step, Look | Census):
            self._go_on(await self._ask(self._step))
        step = self._step
        if step is not None:
            self._go_on(None)
        return step

    def _go_on(self, answer: Answer | None) -> None:
        try:
            self._step = next(self._steps) if answer is None else self._steps.send(answer)
        except StopIteration:
            self._step = None


class HistoryIterator(AsyncIterator[StoredMessage]):
    """
    Stored messages, read as they are iterated over.

    :param reader: gives them, the newest first
    :param channel: the channel, for errors
    :param oldest_first: whether to gather all of them, and give the oldest first
    """

    def __init__(self, reader: Reader, channel: str, oldest_first: bool) -> None:
        self._reader = reader
        self._channel = channel
        self._gathered: list[StoredMessage | Unread] | None = [] if oldest_first else None
        self._complete = False
        self._guard = anyio.ResourceGuard("iterating over")

    async def __anext__(self) -> StoredMessage:
        with self._guard:
            found = await self._next()
        if found is None:
            raise StopAsyncIteration
        if isinstance(found, Unread):
            since, until = (datetime.fromtimestamp(second, UTC) for second in found[:2])
            raise HistoryIncompleteError(
                found.reason, channel=self._channel, since=since, until=until
            )
        return found

    async def _next(self) -> StoredMessage | Unread | None:
        if self._gathered is None:
            return await self._reader.next()
        if self._complete:
            await checkpoint()
        while not self._complete:
            found = await self._reader.next()
            self._complete = found is None
            if found is not None:
                self._gathered.append(found)
        return self._gathered.pop() if self._gathered else None


class History:
    """
    Reads stored messages.

    :param requester: sends requests
    """

    def __init__(self, requester: Requester) -> None:
        self._requester = requester
        self._known = Known()

    def read(
        self,
        key: Key,
        channel: str,
        last: int | None,
        since: datetime | float | None,
        until: datetime | float | None,
        order: str,
        timeout: Timeout,
    ) -> HistoryIterator:
        """Return an iterator over stored messages, after checking every argument."""
        key = check_key_source(key)
        channel = check_channel(channel, wildcards=True)
        check_stored(channel)
        count = _DEFAULT_LAST if last is None else check_int("last", last, 0)
        newest = check_choice("order", order, ("oldest", "newest")) == "newest"
        timeout = check_timeout(timeout)
        first, final = unix_seconds("since", since), unix_seconds("until", until)
        text = key if isinstance(key, str) else PLACEHOLDER_KEY
        asked = requests.history(text, channel, last=count, since=first, until=final)
        self._requester.check_size(asked.topic.encode(), asked.body, 1)
        reader = self.reader(self._requester, key, channel, count, first, final, timeout)
        return HistoryIterator(reader, channel, not newest)

    def reader(
        self,
        requester: Requester,
        key: Key,
        channel: str,
        last: int,
        since: int | None,
        until: int | None = None,
        timeout: Timeout = DEFAULT,
    ) -> Reader:
        """
        Make a reader of stored messages.

        :param requester: sends the requests
        :param last: the most messages
        :param since: the first second, in unix time
        :param until: the last second, in unix time
        """
        level = levels(channel)[0]
        reading = Reading(last, since, until, int(time.time()), self._known, level)
        return Reader(reading, partial(_look, requester, key, channel, timeout))


async def _look(
    requester: Requester, key: Key, channel: str, timeout: Timeout, look: Look | Census
) -> Answer:
    if isinstance(look, Look):
        return await requester.with_key(key, partial(_page, requester, channel, timeout, look))
    return await requester.with_key(key, partial(_take_census, requester, channel, timeout))


async def _page(
    requester: Requester, channel: str, timeout: Timeout, look: Look, key: str
) -> Answer:
    last, since, until, before = look
    asked = requests.history(key, channel, last=last, since=since, until=until, before=before)
    connection, pending = await requester.send(asked)
    start = anyio.current_time()
    try:
        messages = await requester.answer(connection, pending, timeout)
    except RequestError as exc:
        if exc.status is not None:
            raise
        # Only the acknowledgement came: the answer was too large for the broker to send.
        messages = None
    return Answer(messages, anyio.current_time() - start >= _PAGE_SECONDS)


async def _take_census(requester: Requester, channel: str, timeout: Timeout, key: str) -> Answer:
    asked = requests.presence(key, channel, status=True, changes=None)
    # One answer may be slow without other nodes: a busy broker writes once a second.
    for _ in range(2):
        connection, pending = await requester.send(replace(asked, emits=False))
        start = anyio.current_time()
        try:
            await requester.answer(connection, pending, timeout)
        except RequestError:
            # As a rule, the key has no permission for presence.
            return Answer(None)
        if anyio.current_time() - start < _CENSUS_SECONDS:
            return Answer(None)
    return Answer(None, True)


def check_stored(channel: str) -> None:
    """
    Check that what is stored of a channel can be read back.

    :raises InvalidChannelError: if the broker would find nothing
    """
    if levels(channel)[0] in ("+", "#"):
        raise InvalidChannelError(
            f"channel {channel!r}: history needs a literal first level, by which the broker finds "
            "what it has stored"
        )
