"""Presence: statuses, changes for handlers, and feeds."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio

from emitter_anyio._backend.tasks import is_cancelled
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
from emitter_anyio._values.channels import (
    PLACEHOLDER_KEY,
    Key,
    KeySource,
    check_key_source,
)
from emitter_anyio._values.checks import check_flag, check_seconds
from emitter_anyio._values.errors import (
    ConnectionLostError,
    EmitterError,
    RequestError,
    RequestTimeoutError,
)
from emitter_anyio._values.requests import PresenceEvent, PresenceStatus
from emitter_anyio._values.router import Routes, check_delivered
from emitter_anyio._values.templates import Channel, check_pattern

from .feed import PresenceFeed, Watch


class Presence:
    """
    The presence requests and feeds of a client.

    :param slot: the current connection
    :param requester: sends requests
    :param wants: the feeds that the client requests on every connection
    :param keys: the keys that functions have returned
    :param routes: the receivers of presence changes
    :param events: emits errors
    :param totals: counts the items that closed feeds have dropped
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
        self._for_handlers: dict[str, KeySource] = {}
        """The channels with ``presence(changes=True)``, and their keys."""
        self._watches: dict[Watch, KeySource] = {}

    def finish(self) -> None:
        """Forget the channels with changes for handlers, because the client has ended."""
        self._for_handlers.clear()

    async def presence(
        self, key: Key, channel: str | Channel, changes: bool | None, timeout: Timeout
    ) -> PresenceStatus:
        """Request a status, and turn the changes for handlers on or off."""
        key, channel = self._check(key, channel)
        changes = None if changes is None else check_flag("changes", changes)
        timeout = check_timeout(timeout)
        self._owner.check()
        is_new = changes is True and channel not in self._for_handlers
        if is_new:
            self._wants.watch(channel)
            self._for_handlers[channel] = key
        try:
            sent_changes = changes
            if changes is False:
                sent_changes = False if self._stop_changes(channel) else None
            request = partial(_request_status, self._requester, channel, sent_changes, timeout)
            status = await self._requester.with_key(key, request)
        except BaseException:
            if is_new:
                self._stop_changes(channel)
            raise
        if changes and channel in self._for_handlers:
            # Restore with this key, because the broker has just accepted it.
            self._for_handlers[channel] = key
        return status

    def watch(
        self,
        key: Key,
        channel: str | Channel,
        buffer: int,
        overflow: Overflow,
        refresh: float | None,
        timeout: Timeout,
    ) -> Entering[PresenceFeed]:
        """Check every argument, and return a presence feed to be entered."""
        key, channel = self._check(key, channel)
        check_delivered(channel, self._wants.matcher)
        check_buffer(buffer, overflow)
        timeout = check_timeout(timeout)
        if refresh is not None and not check_seconds("refresh", refresh):
            raise ValueError("refresh must be more than 0 seconds, or None to disable it, not 0")
        return Entering(
            self._owner,
            partial(self._watching, key, channel, buffer, overflow, refresh, timeout),
        )

    @asynccontextmanager
    async def _watching(
        self,
        key: KeySource,
        channel: str,
        buffer: int,
        overflow: Overflow,
        refresh: float | None,
        timeout: Timeout,
    ) -> AsyncGenerator[PresenceFeed]:
        await self._requester.connected()
        refreshing = anyio.CancelScope()

        def leave(send: Sender[PresenceEvent]) -> None:
            refreshing.cancel()
            self._watches.pop(watch, None)
            for receiver in watch.receivers:
                self._routes.discard(FEED, receiver)
            self._totals.leave_stream(send)
            self._leave(channel, self._keys.known(key))

        self._wants.watch(channel)
        what = f"watch_presence({channel!r})"
        send: Sender[PresenceEvent] = Sender(what, buffer, overflow, leave)
        watch = Watch(channel, send)
        for receiver in watch.receivers:
            self._routes.add(FEED, receiver, channel)
        update = partial(_update_members, self._requester, watch, key, channel, timeout)
        try:
            with PresenceFeed(send, channel, watch.members.view) as feed:
                status, _ = await update(changes=True)
                send.put_in_front([status])
                self._watches[watch] = key
                self._background.start_soon(self._refresh, watch, key, channel, refresh, refreshing)
                yield feed
        finally:
            send.leave()

    def _leave(self, channel: str, key: str | None) -> bool:
        """
        Count one user less of a feed.

        :param key: the key for the request that ends the feed after its last user has left;
            ``None``: no request
        :return: whether this was the last user
        """
        last, session = self._wants.unwatch(channel), self._slot.session
        if last and session is not None:
            session.leave_feed()
            if key is not None:
                ending = requests.presence(key, channel, status=False, changes=False)
                # Quiet, because the broker refuses this request too if it has refused the feed.
                session.request(ending, awaited=False, quiet=True)
        return last

    def _stop_changes(self, channel: str) -> bool:
        """Undo ``changes=True``; return whether the feed has no other user."""
        if channel not in self._for_handlers:
            return not self._wants.is_watched(channel)
        del self._for_handlers[channel]
        return self._leave(channel, None)

    def _check(self, key: Key, channel: str | Channel) -> tuple[KeySource, str]:
        source, channel = check_key_source(key), check_pattern(channel)
        text = source if isinstance(source, str) else PLACEHOLDER_KEY
        longest = requests.presence(text, channel, status=False, changes=False)
        self._requester.check_size(longest.topic.encode(), longest.body, 1)
        return source, channel

    async def _refresh(
        self,
        watch: Watch,
        key: KeySource,
        channel: str,
        refresh: float | None,
        scope: anyio.CancelScope,
    ) -> None:
        """Request fresh statuses every ``refresh`` seconds, and when the members are stale."""
        period = math.inf if refresh is None else refresh
        gaps = 0
        due = anyio.current_time() + period
        with scope:
            # In a task group that was never left, Trio's scopes catch the task's cancellation.
            while not (watch.send.ended or is_cancelled()):
                stale = await watch.members.wait_stale(due - anyio.current_time())
                if is_cancelled():
                    return
                # The channel's own status is enough for stale members. Every `refresh` seconds and
                # after a lost connection, request statuses of channels below it as well.
                channels = [channel]
                gaps, known_gaps = watch.send.gaps, gaps
                if not stale or gaps > known_gaps or anyio.current_time() >= due:
                    channels += watch.members.next_channels()
                    due = anyio.current_time() + period
                for each in channels:
                    try:
                        status, new = await _update_members(
                            self._requester, watch, key, each, DEFAULT, changes=None
                        )
                    except RequestError as exc:
                        if each == channel:
                            _end_feed(watch, exc)
                            return
                        # The key does not cover the channel below, so only its changes are known.
                    except RequestTimeoutError as exc:
                        self._events.report(exc)
                    except ConnectionLostError:
                        # Restoring the feed on the next connection requests a status.
                        break
                    except EmitterError:
                        # The client has ended, and the feed with it.
                        return
                    else:
                        if new:
                            await watch.send.put(status)

    # Lost and new connections

    def note_loss(self) -> None:
        """Note in every feed that the connection was lost."""
        for watch in self._watches:
            watch.note_gap()

    def restore(self, restoring: Restoring) -> Iterable[Restoration]:
        """Request every feed on a new connection."""
        requester = restoring.requester
        for watch, key in self._watches.items():
            yield Restoration(
                f"the presence feed of {watch.channel!r}",
                partial(self._restore_feed, requester, watch, key),
                partial(_end_feed, watch),
            )
        for channel, key in self._for_handlers.items():
            yield Restoration(
                f"the presence changes of {channel!r}",
                partial(self._restore_changes, requester, channel, key),
                partial(self._changes_refused, channel),
            )

    async def _restore_feed(self, requester: Requester, watch: Watch, key: KeySource) -> None:
        if watch not in self._watches:
            return
        update = partial(_update_members, requester, watch, key, watch.channel, DEFAULT)
        status, new = await update(changes=True)
        watch.members.mark_stale()
        if new:
            # Restoring does not wait for the feed's consumer.
            watch.send.push_or_drop(status)

    async def _restore_changes(self, requester: Requester, channel: str, key: KeySource) -> None:
        if channel in self._for_handlers:
            request = partial(_request_status, requester, channel, True, DEFAULT)
            await requester.with_key(key, request)

    def _changes_refused(self, channel: str, error: Exception) -> None:
        self._stop_changes(channel)
        self._events.emit("error", error)


async def _request_status(
    requester: Requester, channel: str, changes: bool | None, timeout: Timeout, key: str
) -> PresenceStatus:
    request = requests.presence(key, channel, status=True, changes=changes)
    status = await requester.request(request, timeout)
    assert status is not None
    return status


async def _update_members(
    requester: Requester,
    watch: Watch,
    key: KeySource,
    channel: str,
    timeout: Timeout,
    *,
    changes: bool | None,
) -> tuple[PresenceStatus, bool]:
    """Request a status, and correct the feed's members; return it and whether they changed."""
    watch.members.begin_status()
    request = partial(_request_status, requester, channel, changes, timeout)
    status = await requester.with_key(key, request)
    return status, watch.members.apply_status(channel, status)


def _end_feed(watch: Watch, error: Exception) -> None:
    watch.send.end(lambda: error)
