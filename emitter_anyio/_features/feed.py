"""A presence feed: a stream of changes, and the current members."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import anyio

from emitter_anyio._streams import EventStream, Receiver, Sender
from emitter_anyio._values.requests import Member, PresenceEvent, PresenceStatus

_STATUS_DELAY_SECONDS: Final = 0.1
_STATUS_DELAY_SECONDS_PER_MEMBER: Final = 0.001
"""
The delay before the status of stale members is requested, so that one status covers many changes.

A status has some 36 bytes for each member, so a busy channel costs at most 36 KB a second.
"""

_MAX_EMPTY_CHANNELS: Final = 1024
"""The number of channels below the watched one that are kept although they have no members."""

_CHANNELS_PER_REFRESH: Final = 64
"""The number of channels below the watched one whose status each refresh requests."""


class PresenceFeed(EventStream[PresenceEvent]):
    """
    A stream of presence changes of a channel, which starts with the current status.

    Its items are :class:`PresenceEvent` and :class:`PresenceStatus`. The client requests a fresh
    status from time to time, because an event can be lost. If that status changes :attr:`members`,
    it is an item of the stream as well.

    :ivar channel: the watched channel
    """

    def __init__(
        self, send: Sender[PresenceEvent], channel: str, members: Mapping[str, Member]
    ) -> None:
        super().__init__(send)
        self.channel = channel
        self._members = members

    @property
    def members(self) -> Mapping[str, Member]:
        """
        The current members, by the id of their connection, as a read-only view that stays current.

        It is updated when an event or a status arrives, independently of receiving from the stream.
        It has the clients that would receive a message sent to the channel, and those that
        subscribed below the channel after the feed had started. In a cluster, a status lists only
        the clients of the node to which this client is connected.
        """
        return self._members


class Watch:
    """
    The state of a ``watch_presence()`` call.

    :ivar channel: the watched channel
    :ivar members: the current members
    :ivar send: the send end of the feed
    """

    def __init__(self, channel: str, send: Sender[PresenceEvent]) -> None:
        self.channel = channel
        self.members = Members(channel)
        self.send = send

    @property
    def receivers(self) -> tuple[Receiver[PresenceEvent], ...]:
        """The receivers of changes: the members first, so that they are current for consumers."""
        return self.members, self.send

    def note_gap(self) -> None:
        """Note that the connection was lost."""
        for receiver in self.receivers:
            receiver.note_gap()


class Members(Receiver[PresenceEvent]):
    """
    The current members of a channel, according to events and statuses.

    In a cluster a status lists only the members on the node to which the client is connected, while
    events arrive from all nodes. So a status removes a member only if an earlier status on the same
    connection listed that member.

    :param channel: the watched channel
    """

    def __init__(self, channel: str) -> None:
        self._channel = channel
        self._by_channel: dict[str, dict[str, Member]] = {channel: {}}
        self._members: dict[str, Member] = {}
        self._listed: set[str] = set()
        """The ids that a status has listed since the connection was opened."""
        self._changed: set[str] = set()
        self._stale = anyio.Event()

    @property
    def view(self) -> Mapping[str, Member]:
        """The current members by the id of their connection, as a view that stays current."""
        return MappingProxyType(self._members)

    def note_gap(self) -> None:
        """Note that the connection was lost. The next one might lead to another node."""
        self._listed.clear()
        for id, member in self._members.items():
            self._members[id] = replace(member, confirmed=False)

    def next_channels(self) -> list[str]:
        """Return the channels below the watched one whose status to request next, in rotation."""
        below = [channel for channel in self._by_channel if channel != self._channel]
        below = below[:_CHANNELS_PER_REFRESH]
        for channel in below:
            self._by_channel[channel] = self._by_channel.pop(channel)
        return below

    def push(self, item: PresenceEvent, *, extra: bool = False) -> bool:
        """Apply a change."""
        (member,) = item.who
        self._changed.add(member.id)
        there = self._members_in(item.channel)
        if item.event == "subscribe":
            there[member.id] = self._members[member.id] = member
            return True
        # When a node dies, each other node reports that its members have unsubscribed, but with
        # wrong ids, which may belong to other members. A different user name proves that an id is
        # wrong, and a status corrects the rest. A status also lists a member that is still reached
        # by another subscription.
        known = self._members.get(member.id, member)
        if known.username == member.username:
            there.pop(member.id, None)
        self.mark_stale()
        self._remove_absent()
        return True

    def begin_status(self) -> None:
        """Note that a status is being requested, which might not include later changes."""
        self._changed.clear()
        if self._stale.is_set():
            # Only if it is set, because the refreshing task might be waiting for this event.
            self._stale = anyio.Event()

    def apply_status(self, channel: str, status: PresenceStatus) -> bool:
        """Apply the status of a channel; return whether it changed the members."""
        before = self._names()
        there = self._members_in(channel)
        listed = {member.id: member for member in status.who}
        for id in (there.keys() & self._listed) - listed.keys() - self._changed:
            del there[id]
        self._listed |= listed.keys()
        # A status also lists the subscribers of parent channels, which are recorded only there.
        above = {} if channel == self._channel else self._by_channel[self._channel]
        for id in listed.keys() - self._changed:
            self._members[id] = listed[id]
            if id not in above:
                there[id] = listed[id]
        if self._changed:
            self.mark_stale()
        self._remove_absent()
        return self._names() != before

    def mark_stale(self) -> None:
        """Mark the members as possibly wrong, so that a fresh status is requested."""
        self._stale.set()

    async def wait_stale(self, seconds: float) -> bool:
        """
        Wait until the members are stale, or for at most ``seconds``.

        :return: whether the members are stale
        """
        with anyio.move_on_after(seconds):
            await self._stale.wait()
            # Several members often leave together. One status is enough for all of them.
            per_member = _STATUS_DELAY_SECONDS_PER_MEMBER * len(self._members)
            await anyio.sleep(_STATUS_DELAY_SECONDS + per_member)
        return self._stale.is_set()

    def _members_in(self, channel: str) -> dict[str, Member]:
        if channel not in self._by_channel and len(self._by_channel) > _MAX_EMPTY_CHANNELS:
            empty = (c for c, there in self._by_channel.items() if not there and c != self._channel)
            if (oldest := next(empty, None)) is not None:
                del self._by_channel[oldest]
        return self._by_channel.setdefault(channel, {})

    def _names(self) -> dict[str, str | None]:
        return {id: member.username for id, member in self._members.items()}

    def _remove_absent(self) -> None:
        here = {id for there in self._by_channel.values() for id in there}
        for id in self._members.keys() - here:
            del self._members[id]
