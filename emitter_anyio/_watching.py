"""Watching presence: who is there, and who comes and goes."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from functools import partial

import anyio

from . import _requests as requests
from ._buffer import Overflow, check_buffer
from ._channels import A_KEY, Key, check_channel, check_source
from ._checks import check_flag, check_seconds
from ._conversation import DEFAULT, Conversation, Timeout, check_timeout
from ._errors import ConnectionLostError, EmitterError, RequestError, RequestTimeoutError
from ._options import Options
from ._presence import PresenceFeed
from ._reconnecting import Restoration
from ._requests import PresenceStatus
from ._subscription import Entering


class Watcher(Conversation):
    """The verbs ``presence`` and ``watch_presence``."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._presence_wanted: dict[str, Key] = {}
        self._watches: dict[PresenceFeed, Key] = {}
        self._restorers.append(self._restore_presence)

    def _begin(self) -> None:
        super()._begin()
        self._presence_wanted.clear()

    async def presence(
        self,
        key: Key,
        channel: str,
        *,
        changes: bool | None = None,
        timeout: Timeout = DEFAULT,
    ) -> PresenceStatus:
        """
        Ask whom a message to a channel would reach.

        :param key: a key with the permission for presence (``p``)
        :param channel: the channel; who is subscribed below it is not there
        :param changes: ``True`` has the broker tell ``on("presence")`` of changes, at the channel
            and below it, from now on; ``False`` ends that; ``None`` leaves it as it is
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: who is there now
        :raises UnauthorizedError: if the key may not
        :raises RequestError: without a status, if the answer was too large for the broker to send
        """
        key, channel = self._check_presence(key, channel)
        changes = None if changes is None else check_flag("changes", changes)
        timeout = check_timeout(timeout)
        self._owner.check()
        fresh = changes is True and channel not in self._presence_wanted
        if fresh:
            self._session.watch(channel)
            self._presence_wanted[channel] = key
        try:
            told = changes
            if changes is False:
                told = False if self._unwant_presence(channel) else None
            status = await self._keyed(key, partial(self._ask_presence, channel, told, timeout))
        except BaseException:
            if fresh:
                self._unwant_presence(channel)
            raise
        if changes and channel in self._presence_wanted:
            # The key that has just served is the one to come back with.
            self._presence_wanted[channel] = key
        return status

    def _check_presence(self, key: Key, channel: str) -> tuple[Key, str]:
        key, channel = check_source(key), check_channel(channel, wildcards=True)
        text = key if isinstance(key, str) else A_KEY
        longest = requests.presence(text, channel, status=False, changes=False)
        self._check_size(longest.topic.encode(), longest.body, 1)
        return key, channel

    async def _ask_presence(
        self, channel: str, changes: bool | None, timeout: Timeout, key: str
    ) -> PresenceStatus:
        status = await self._request(
            requests.presence(key, channel, status=True, changes=changes), timeout
        )
        assert status is not None
        return status

    def _unwant_presence(self, channel: str) -> bool:
        """Take back ``changes=True``; tells whether nobody else needs the feed."""
        if channel not in self._presence_wanted:
            return not self._session.watched(channel)
        del self._presence_wanted[channel]
        return self._session.unwatch(channel)

    def watch_presence(
        self,
        key: Key,
        channel: str,
        *,
        buffer: int = 1024,
        overflow: Overflow = "raise",
        refresh: float | None = 60,
        timeout: Timeout = DEFAULT,
    ) -> Entering[PresenceFeed]:
        """
        Watch who comes and goes; entered with ``async with``.

        :param key: a key with the permission for presence (``p``)
        :param channel: the channel; what happens below it is told too
        :param buffer: how many events may wait in the stream
        :param overflow: what happens to more, as in :meth:`subscribe`
        :param refresh: every so many seconds a fresh status is asked for; ``None`` never
        :param timeout: seconds for the broker to answer, instead of ``request_timeout``
        :return: to be entered, for a :class:`PresenceFeed`
        :raises UnauthorizedError: when entered, if the key may not
        """
        key, channel = self._check_presence(key, channel)
        check_buffer(buffer, overflow)
        timeout = check_timeout(timeout)
        if refresh is not None and not check_seconds("refresh", refresh):
            raise ValueError("refresh must be above 0 seconds, or None for no fresh status")
        return Entering(
            self._owner,
            partial(self._watching, key, channel, buffer, overflow, refresh, timeout),
        )

    @asynccontextmanager
    async def _watching(
        self,
        key: Key,
        channel: str,
        buffer: int,
        overflow: Overflow,
        refresh: float | None,
        timeout: Timeout,
    ) -> AsyncGenerator[PresenceFeed]:
        await self._linked()
        self._session.watch(channel)
        feed = PresenceFeed(channel, buffer, overflow)
        self._feeds.add(feed, channel)
        healing = anyio.CancelScope()
        try:
            status, _ = await self._status(feed, key, channel, timeout, changes=True)
            feed.put_in_front([status])
            self._watches[feed] = key
            assert self._tasks is not None
            self._tasks.start_soon(self._heal, feed, key, channel, refresh, healing)
            yield feed
        finally:
            healing.cancel()
            self._watches.pop(feed, None)
            self._feeds.discard(feed)
            self._leave_stream(feed)
            text = self._keys.known(key)
            if self._session.unwatch(channel) and self._session.linked and text is not None:
                off = self._session.request(
                    requests.presence(text, channel, status=False, changes=False), awaited=False
                )
                # If it was refused, so is this, and that is no news.
                off.quiet = True
                off.call_when_done(partial(self._session.unwatched, channel))

    async def _status(
        self,
        feed: PresenceFeed,
        key: Key,
        channel: str,
        timeout: Timeout = DEFAULT,
        *,
        changes: bool | None = None,
    ) -> tuple[PresenceStatus, bool]:
        feed.asking()
        status = await self._keyed(key, partial(self._ask_presence, channel, changes, timeout))
        return status, feed.correct(channel, status)

    async def _heal(
        self,
        feed: PresenceFeed,
        key: Key,
        channel: str,
        refresh: float | None,
        scope: anyio.CancelScope,
    ) -> None:
        period = math.inf if refresh is None else refresh
        gaps = 0
        due = anyio.current_time() + period
        with scope:
            while not feed.ended:
                doubted = await feed.doubted(due - anyio.current_time())
                # A doubt is about those whom the status of the channel names. Now and then, and
                # when the link was away, who is below it is looked at, too.
                channels = [channel]
                gaps, known_gaps = feed.statistics().gaps, gaps
                if not doubted or gaps > known_gaps or anyio.current_time() >= due:
                    channels += feed.next_below()
                    due = anyio.current_time() + period
                for asked in channels:
                    try:
                        status, new = await self._status(feed, key, asked)
                    except RequestError as exc:
                        if asked == channel:
                            _end_feed(feed, exc)
                            return
                        # The key is not for what is below: events alone must tell of it.
                    except RequestTimeoutError as exc:
                        self._report(exc)
                    except ConnectionLostError:
                        # The next link begins with a status of its own.
                        break
                    except EmitterError:
                        # There is no link any more, and the feed has been told so.
                        return
                    else:
                        if new:
                            await feed.put(status)

    # When the link was lost

    def _restore_presence(self) -> Iterable[Restoration]:
        for feed, key in self._watches.items():
            yield Restoration(
                f"the presence feed of {feed.channel!r}",
                partial(self._restore_feed, feed, key),
                partial(_end_feed, feed),
            )
        for channel, key in self._presence_wanted.items():
            yield Restoration(
                f"the changes of presence of {channel!r}",
                partial(self._restore_changes, channel, key),
                partial(self._changes_refused, channel),
            )

    async def _restore_feed(self, feed: PresenceFeed, key: Key) -> None:
        if feed not in self._watches:
            return
        status, new = await self._status(feed, key, feed.channel, changes=True)
        feed.doubt()
        if new:
            # Nobody is kept waiting for this reader before the link may be used.
            feed.push_or_drop(status)

    async def _restore_changes(self, channel: str, key: Key) -> None:
        if channel in self._presence_wanted:
            await self._keyed(key, partial(self._ask_presence, channel, True, DEFAULT))

    def _changes_refused(self, channel: str, error: Exception) -> None:
        self._unwant_presence(channel)
        self._emit("error", error)


def _end_feed(feed: PresenceFeed, error: Exception) -> None:
    feed.end(lambda: error)
