"""Reading back what the broker has stored, page by page."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Final, Literal, TypeVar

import anyio
from anyio.lowlevel import checkpoint

from . import _requests as requests
from ._channels import A_KEY, Key, check_channel, check_source, levels, unix_seconds
from ._checks import check_choice, check_int
from ._conversation import DEFAULT, Conversation, Timeout, check_timeout
from ._errors import HistoryIncompleteError, InvalidChannelError, RequestError
from ._messages import StoredMessage
from ._options import Options
from ._pending import Pending
from ._requests import Request
from ._stored import Answer, Census, Known, Look, Reading, Unread

T = TypeVar("T")

_PAGE_SECONDS: Final = 1.9
"""A node waits 2 s for others that do not answer; a page that took this long may lack theirs."""
_CENSUS_SECONDS: Final = 0.9
"""A node that has others waits 1 s for what they do not say of presence."""
_USUAL: Final = 100
"""How many messages ``history()`` gives unless told otherwise."""


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


class History(AsyncIterator[StoredMessage]):
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


class Historian(Conversation):
    """The verb ``history``."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._stored_by = Known()

    def history(
        self,
        key: Key,
        channel: str,
        last: int | None = None,
        *,
        since: datetime | float | None = None,
        until: datetime | float | None = None,
        order: Literal["oldest", "newest"] = "oldest",
        timeout: Timeout = DEFAULT,
    ) -> AsyncIterator[StoredMessage]:
        """
        Read back stored messages of a channel, and of all channels below it.

        They come in the order of time: by the second, and within a second in the order of the ids
        of each node of the broker. They are requested in pages, each as large as the broker can
        send.

        :param key: a key with the permission to load (``l``)
        :param channel: the channel; any level except the first may be ``+``
        :param last: the number of messages at most, the newest ones; 100 unless given
        :param since: the time, as an aware ``datetime`` or unix seconds, before which none is read
        :param until: the time after which none is read
        :param order: ``"oldest"`` gives the oldest message first, and gathers all before that;
            ``"newest"`` gives the newest first, and holds one page at a time
        :param timeout: seconds for the broker to answer each page, instead of
            ``request_timeout``
        :return: an asynchronous iterator of :class:`StoredMessage`. It needs no closing. After an
            error, or when it was cancelled, iterating further continues at the same place
        :raises InvalidChannelError: if the broker would not take the channel
        :raises UnauthorizedError: when iterated, if the key may not load
        :raises HistoryIncompleteError: when iterated, at the place where stored messages cannot be
            read
        """
        key = check_source(key)
        channel = check_channel(channel, wildcards=True)
        check_stored(channel)
        count = _USUAL if last is None else check_int("last", last, 0)
        newest = check_choice("order", order, ("oldest", "newest")) == "newest"
        timeout = check_timeout(timeout)
        first, final = unix_seconds("since", since), unix_seconds("until", until)
        text = key if isinstance(key, str) else A_KEY
        asked = requests.history(text, channel, last=count, since=first, until=final)
        self._check_size(asked.topic.encode(), asked.body, 1)
        reader = self._reader(key, channel, count, first, final, timeout)
        return History(reader, channel, not newest)

    def _reader(
        self,
        key: Key,
        channel: str,
        last: int,
        since: int | None,
        until: int | None = None,
        timeout: Timeout = DEFAULT,
    ) -> Reader:
        level = levels(channel)[0]
        reading = Reading(last, since, until, int(time.time()), self._stored_by, level)
        return Reader(reading, partial(self._look_up, key, channel, timeout))

    async def _look_up(
        self, key: Key, channel: str, timeout: Timeout, look: Look | Census
    ) -> Answer:
        if isinstance(look, Look):
            return await self._keyed(key, partial(self._page, channel, timeout, look))
        return await self._keyed(key, partial(self._take_census, channel, timeout))

    async def _page(self, channel: str, timeout: Timeout, look: Look, key: str) -> Answer:
        last, since, until, before = look
        asked = requests.history(key, channel, last=last, since=since, until=until, before=before)
        pending = await self._put(asked)
        start = anyio.current_time()
        try:
            messages = await self._answer(pending, timeout)
        except RequestError as exc:
            if exc.status is not None:
                raise
            # Only the acknowledgement came: the answer was too large for the broker to send.
            messages = None
        return Answer(messages, anyio.current_time() - start >= _PAGE_SECONDS)

    async def _take_census(self, channel: str, timeout: Timeout, key: str) -> Answer:
        asked = requests.presence(key, channel, status=True, changes=None)
        # Without other nodes, one answer may be slow: a busy broker writes once a second.
        for _ in range(2):
            pending = await self._put(replace(asked, emits=False))
            start = anyio.current_time()
            try:
                await self._answer(pending, timeout)
            except RequestError:
                # The key is not for presence, as a rule.
                return Answer(None)
            if anyio.current_time() - start < _CENSUS_SECONDS:
                return Answer(None)
        return Answer(None, True)

    async def _put(self, request: Request[T]) -> Pending[T]:
        self._check_size(request.topic.encode(), request.body, 1)
        await self._room()
        return self._session.request(request)


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
