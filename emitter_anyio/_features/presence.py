"""Presence: who is there, and who comes and goes."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio

from emitter_anyio._protocol.wants import Wants
from emitter_anyio._runtime.background import Background
from emitter_anyio._runtime.dispatcher import FEED
from emitter_anyio._runtime.events import Events
from emitter_anyio._runtime.key_ring import KeyRing
from emitter_anyio._runtime.requester import DEFAULT, Requester, Timeout, check_timeout
from emitter_anyio._runtime.slot import Slot
from emitter_anyio._runtime.supervisor import Restoration, Restoring
from emitter_anyio._runtime.totals import Totals
from emitter_anyio._streams import Entering, Overflow, Receiver, Sender, check_buffer
from emitter_anyio._values import requests
from emitter_anyio._values.channels import PLACEHOLDER_KEY, Key, check_channel, check_key_source
from emitter_anyio._values.checks import check_flag, check_seconds
from emitter_anyio._values.errors import (
    ConnectionLostError,
    EmitterError,
    RequestError,
    RequestTimeoutError,
)
from emitter_anyio._values.requests import PresenceEvent, PresenceStatus
from emitter_anyio._values.router import Routes

from .feed import PresenceFeed, Watch


class Presence:
    """
    Asks for presence, and keeps presence feeds.

    :param slot: the present connection
    :param requester: sends requests
    :param wants: which feeds the broker is asked for
    :param keys: the keys that functions have returned
    :param routes: gives presence changes to feeds
    :param events: gets errors
    :param totals: counts what closed feeds have dropped
    :param background: runs tasks
    """

    def __init__(
        self,
        slot: Slot,
        requester: Requester,
        wants: Wants,
        keys: KeyRing,
        routes: Routes[Receiver[Any]],
        events: Events,
        totals: Totals,
        background: Background,
    ) -> None:
        self._slot = slot
        self._owner = slot.owner
        self._requester = requester
        self._wants = wants
        self._keys = keys
        self._routes = routes
        self._events = events
        self._totals = totals
        self._background = background
        self._for_handlers: dict[str, Key] = {}
        """The channels with ``presence(changes=True)``, and their keys."""
        self._watches: dict[Watch, Key] = {}

    def finish(self) -> None:
        """Forget what the handlers want, because the client has ended."""
        self._for_handlers.clear()

    async def presence(
        self, key: Key, channel: str, changes: bool | None, timeout: Timeout
    ) -> PresenceStatus:
        """Return who is there, and turn the changes for handlers on or off."""
        key, channel = self._check(key, channel)
        changes = None if changes is None else check_flag("changes", changes)
        timeout = check_timeout(timeout)
        self._owner.check()
        fresh = changes is True and channel not in self._for_handlers
        if fresh:
            self._wants.watch(channel)
            self._for_handlers[channel] = key
        try:
            told = changes
            if changes is False:
                told = False if self._leave_for_handlers(channel) else None
            ask = partial(_ask, self._requester, channel, told, timeout)
            status = await self._requester.with_key(key, ask)
        except BaseException:
            if fresh:
                self._leave_for_handlers(channel)
            raise
        if changes and channel in self._for_handlers:
            # The key that has just been accepted is the one to restore with.
            self._for_handlers[channel] = key
        return status

    def watch(
        self,
        key: Key,
        channel: str,
        buffer: int,
        overflow: Overflow,
        refresh: float | None,
        timeout: Timeout,
    ) -> Entering[PresenceFeed]:
        """Return a presence feed to be entered, after checking every argument."""
        key, channel = self._check(key, channel)
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
        await self._requester.connected()
        refreshing = anyio.CancelScope()

        def left(send: Sender[PresenceEvent]) -> None:
            refreshing.cancel()
            self._watches.pop(watch, None)
            for receiver in watch.receivers:
                self._routes.discard(FEED, receiver)
            self._totals.leave_stream(send)
            self._leave(channel, self._keys.known(key))

        self._wants.watch(channel)
        send: Sender[PresenceEvent] = Sender(f"watch_presence({channel!r})", buffer, overflow, left)
        watch = Watch(channel, send)
        for receiver in watch.receivers:
            self._routes.add(FEED, receiver, channel)
        ask = partial(_ask_status, self._requester, watch, key, channel, timeout, changes=True)
        try:
            with PresenceFeed(send, channel, watch.members.view) as feed:
                status, _ = await ask()
                send.put_in_front([status])
                self._watches[watch] = key
                self._background.start_soon(self._refresh, watch, key, channel, refresh, refreshing)
                yield feed
        finally:
            send.leave()

    def _leave(self, channel: str, key: str | None) -> bool:
        """
        Count one user less of a feed.

        :param key: the key with which to end the feed after its last user has left, if any
        :return: whether this was the last user
        """
        last, session = self._wants.unwatch(channel), self._slot.session
        if last and session is not None:
            session.leave_feed(channel)
            if key is not None:
                ending = requests.presence(key, channel, status=False, changes=False)
                # If the feed was refused, so is this, which is no news.
                pending = session.request(ending, awaited=False, quiet=True)
                pending.call_when_done(partial(session.feed_ended, channel))
        return last

    def _leave_for_handlers(self, channel: str) -> bool:
        """Undo ``changes=True``; return whether nothing else needs the feed."""
        if channel not in self._for_handlers:
            return not self._wants.is_watched(channel)
        del self._for_handlers[channel]
        return self._leave(channel, None)

    def _check(self, key: Key, channel: str) -> tuple[Key, str]:
        key, channel = check_key_source(key), check_channel(channel, wildcards=True)
        text = key if isinstance(key, str) else PLACEHOLDER_KEY
        longest = requests.presence(text, channel, status=False, changes=False)
        self._requester.check_size(longest.topic.encode(), longest.body, 1)
        return key, channel

    async def _refresh(
        self,
        watch: Watch,
        key: Key,
        channel: str,
        refresh: float | None,
        scope: anyio.CancelScope,
    ) -> None:
        """Ask for fresh statuses from time to time, and when members are in doubt."""
        period = math.inf if refresh is None else refresh
        gaps = 0
        due = anyio.current_time() + period
        with scope:
            while not watch.send.ended:
                doubted = await watch.members.doubted(due - anyio.current_time())
                # A doubt is about members that the channel's own status lists. From time to time,
                # and after a lost connection, the channels below are asked for as well.
                channels = [channel]
                gaps, known_gaps = watch.send.gaps, gaps
                if not doubted or gaps > known_gaps or anyio.current_time() >= due:
                    channels += watch.members.next_below()
                    due = anyio.current_time() + period
                for asked in channels:
                    try:
                        status, new = await _ask_status(
                            self._requester, watch, key, asked, DEFAULT, changes=None
                        )
                    except RequestError as exc:
                        if asked == channel:
                            _end(watch, exc)
                            return
                        # The key does not open the channel below: changes alone must do.
                    except RequestTimeoutError as exc:
                        self._events.report(exc)
                    except ConnectionLostError:
                        # The next connection begins with a status.
                        break
                    except EmitterError:
                        # There is no connection any more, and the feed has ended.
                        return
                    else:
                        if new:
                            await watch.send.put(status)

    # When the connection was lost, and on a new one

    def lose(self) -> None:
        """Note a gap in every feed."""
        for watch in self._watches:
            watch.note_gap()

    def restore(self, restoring: Restoring) -> Iterable[Restoration]:
        """Ask for every feed."""
        requester = restoring.requester
        for watch, key in self._watches.items():
            yield Restoration(
                f"the presence feed of {watch.channel!r}",
                partial(self._restore_feed, requester, watch, key),
                partial(_end, watch),
            )
        for channel, key in self._for_handlers.items():
            yield Restoration(
                f"the changes of presence of {channel!r}",
                partial(self._restore_changes, requester, channel, key),
                partial(self._changes_refused, channel),
            )

    async def _restore_feed(self, requester: Requester, watch: Watch, key: Key) -> None:
        if watch not in self._watches:
            return
        status, new = await _ask_status(requester, watch, key, watch.channel, DEFAULT, changes=True)
        watch.members.doubt()
        if new:
            # Restoring does not wait for the feed's consumer.
            watch.send.push_or_drop(status)

    async def _restore_changes(self, requester: Requester, channel: str, key: Key) -> None:
        if channel in self._for_handlers:
            await requester.with_key(key, partial(_ask, requester, channel, True, DEFAULT))

    def _changes_refused(self, channel: str, error: Exception) -> None:
        self._leave_for_handlers(channel)
        self._events.emit("error", error)


async def _ask(
    requester: Requester, channel: str, changes: bool | None, timeout: Timeout, key: str
) -> PresenceStatus:
    asked = requests.presence(key, channel, status=True, changes=changes)
    status = await requester.request(asked, timeout)
    assert status is not None
    return status


async def _ask_status(
    requester: Requester,
    watch: Watch,
    key: Key,
    channel: str,
    timeout: Timeout,
    *,
    changes: bool | None,
) -> tuple[PresenceStatus, bool]:
    """Ask for a status, correct the feed's members by it, and return whether that changed them."""
    watch.members.asking()
    status = await requester.with_key(key, partial(_ask, requester, channel, changes, timeout))
    return status, watch.members.correct(channel, status)


def _end(watch: Watch, error: Exception) -> None:
    watch.send.end(lambda: error)
