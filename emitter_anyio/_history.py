"""Reading back what the broker has stored, page by page."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Final, Literal

from . import _requests as requests
from ._channels import Key, check_channel, check_source, check_whole, levels, unix_seconds
from ._conversation import DEFAULT, Conversation, Timeout
from ._errors import InvalidChannelError, RequestError
from ._messages import StoredMessage

_PAGE: Final = 128
"""So many messages are asked for at a time, and fewer where they are large."""


class Historian(Conversation):
    """The verb ``history``."""

    def history(
        self,
        key: Key,
        channel: str,
        last: int = 100,
        *,
        since: datetime | float | None = None,
        until: datetime | float | None = None,
        order: Literal["oldest", "newest"] = "oldest",
        timeout: Timeout = DEFAULT,
    ) -> AsyncGenerator[StoredMessage]:
        """
        Read back stored messages of a channel, and of all below it.

        They come in the order of time, which the broker does not keep within one second: it is
        read from their ids. They are asked for in pages, each as large as the broker can send.

        :param key: a key with the permission to load (``l``)
        :param channel: the channel; a level but the first may be ``+``
        :param last: so many of the newest messages at most
        :param since: only what was stored since then: an aware ``datetime`` or unix seconds
        :param until: only what was stored until then
        :param order: ``"oldest"`` gives the oldest of them first, and gathers all before that;
            ``"newest"`` gives the newest first, and holds a page at a time
        :param timeout: seconds for the broker to answer each page, instead of
            ``request_timeout``
        :return: an asynchronous generator of :class:`StoredMessage`, oldest or newest first
        :raises InvalidChannelError: if the broker would not take the channel
        :raises UnauthorizedError: when iterated, if the key may not load
        :raises RequestError: when iterated, without a status, if one message alone is too large
            for the broker to send
        """
        check_source(key)
        channel = check_channel(channel, wildcards=True)
        check_stored(channel)
        if check_whole("last", last) is None:
            raise TypeError("last is a whole number, not NoneType")
        if order not in ("oldest", "newest"):
            raise ValueError(f"order is 'oldest' or 'newest', not {order!r}")
        first, final = unix_seconds("since", since), unix_seconds("until", until)
        newest_first = self._newest_first(key, channel, last, first, final, timeout)
        return newest_first if order == "newest" else _reversed(newest_first)

    async def _newest_first(
        self,
        key: Key,
        channel: str,
        last: int,
        since: int | None,
        until: int | None,
        timeout: Timeout,
    ) -> AsyncGenerator[StoredMessage]:
        size, before = _PAGE, None
        while last:
            size = min(size, last)
            window = {"last": size, "since": since, "until": until}
            ask = partial(self._page, channel, window, before, timeout)
            try:
                page = await self._keyed(key, ask)
            except RequestError as exc:
                # Only an acknowledgement came: the answer was too large for the broker to send.
                if exc.status is not None or size == 1:
                    raise
                size //= 2
                continue
            if not page:
                return
            # The id, and not the time, is where the next page begins: a second has many messages.
            before = max(message.id for message in page)
            last -= len(page)
            # One that is large is no reason to read what lies behind it in small pages.
            size = min(2 * size, _PAGE)
            for message in reversed(page):
                yield message

    async def _page(
        self,
        channel: str,
        window: Mapping[str, Any],
        before: bytes | None,
        timeout: Timeout,
        key: str,
    ) -> list[StoredMessage]:
        return await self._request(requests.history(key, channel, **window, before=before), timeout)


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


async def _reversed(messages: AsyncIterator[StoredMessage]) -> AsyncGenerator[StoredMessage]:
    gathered = [message async for message in messages]
    while gathered:
        yield gathered.pop()
