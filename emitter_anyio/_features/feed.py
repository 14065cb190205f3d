"""The stream of who comes and goes, and who is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import anyio

from emitter_anyio._streams import EventStream, Receiver, Sender
from emitter_anyio._values.requests import Member, PresenceEvent, PresenceStatus

_GATHERED: Final = 0.1
_GATHERED_EACH: Final = 0.001
"""Doubts are gathered for so many seconds before a status is requested: always, and for each member
in addition. A status has some 36 bytes for each, so a busy channel costs at most 36 KB a second."""

_REMEMBERED: Final = 1024
"""So many channels below the watched one are remembered, beside those in which somebody is."""

_LOOKED_AT: Final = 64
"""So many of them are looked at in their turn, at each refresh."""


class PresenceFeed(EventStream[PresenceEvent]):
    """
    A stream of the changes of a channel's presence, the status first.

    :attr:`members` follows what the broker says as it comes in, however far behind the reader of
    the stream is: whom a message to the channel would reach, as a status tells, and who has
    subscribed below it since the feed began, of whom only events tell. An event can be lost, so the
    feed asks for fresh statuses now and then; where one says something new, the
    :class:`PresenceStatus` is an item of the stream too.

    :ivar channel: the channel that is watched
    """

    def __init__(
        self, send: Sender[PresenceEvent], channel: str, members: Mapping[str, Member]
    ) -> None:
        super().__init__(send)
        self.channel = channel
        self._members = members

    @property
    def members(self) -> Mapping[str, Member]:
        """Who is there now, by the id of the connection; a view that stays up to date."""
        return self._members


class Watch:
    """
    What the client holds of one ``watch_presence()``.

    :ivar channel: the channel that is watched
    :ivar members: who is there
    :ivar send: the send end of the feed
    """

    def __init__(self, channel: str, send: Sender[PresenceEvent]) -> None:
        self.channel = channel
        self.members = Members(channel)
        self.send = send

    @property
    def receivers(self) -> tuple[Receiver[PresenceEvent], ...]:
        """What receives the changes: the members first."""
        return self.members, self.send

    def note_gap(self) -> None:
        """Note that the connection was lost."""
        for receiver in self.receivers:
            receiver.note_gap()


class Members(Receiver[PresenceEvent]):
    """
    Who is there, according to the events that it receives, and to statuses.

    In a cluster a status names only those on the node that is asked, while events come from all
    nodes. So a status removes only those whom an earlier one, on the same connection, has named.

    :param channel: the channel that is watched
    """

    def __init__(self, channel: str) -> None:
        self._channel = channel
        self._there: dict[str, dict[str, Member]] = {channel: {}}
        self._members: dict[str, Member] = {}
        self._named: set[str] = set()
        """Who is on the node that is asked: named by a status since the connection was opened."""
        self._touched: set[str] = set()
        self._doubt = anyio.Event()

    @property
    def view(self) -> Mapping[str, Member]:
        """Who is there now, by the id of the connection; it stays up to date."""
        return MappingProxyType(self._members)

    def note_gap(self) -> None:
        """Note that the connection was lost: the next one might lead to another node."""
        self._named.clear()
        for id, member in self._members.items():
            self._members[id] = replace(member, confirmed=False)

    def next_below(self) -> list[str]:
        """Give channels below the watched one in which somebody is or was, each in its turn."""
        below = [channel for channel in self._there if channel != self._channel][:_LOOKED_AT]
        for channel in below:
            self._there[channel] = self._there.pop(channel)
        return below

    def push(self, item: PresenceEvent, *, extra: bool = False) -> bool:
        """Take in a change."""
        (member,) = item.who
        self._touched.add(member.id)
        there = self._place(item.channel)
        if item.event == "subscribe":
            there[member.id] = self._members[member.id] = member
            return True
        # When a node dies, each other node reports its members as gone, with ids that its own
        # members may have. A user name proves that, and a status corrects the rest. A status also
        # names those who are still reached by another subscription.
        known = self._members.get(member.id, member)
        if known.username == member.username:
            there.pop(member.id, None)
        self.doubt()
        self._forget_the_gone()
        return True

    def asking(self) -> None:
        """Note that a status is being asked for: what changes meanwhile, it may not know."""
        self._touched.clear()
        if self._doubt.is_set():
            # Else somebody may be waiting for just this one.
            self._doubt = anyio.Event()

    def correct(self, channel: str, status: PresenceStatus) -> bool:
        """Take in the status of a channel; tells whether it says something new."""
        before = self._names()
        there = self._place(channel)
        told = {member.id: member for member in status.who}
        for id in (there.keys() & self._named) - told.keys() - self._touched:
            del there[id]
        self._named |= told.keys()
        # A status names the subscribers of the parents too: they need no place below.
        above = {} if channel == self._channel else self._there[self._channel]
        for id in told.keys() - self._touched:
            self._members[id] = told[id]
            if id not in above:
                there[id] = told[id]
        if self._touched:
            self.doubt()
        self._forget_the_gone()
        return self._names() != before

    def doubt(self) -> None:
        """Have a fresh status asked for."""
        self._doubt.set()

    async def doubted(self, seconds: float) -> bool:
        """
        Wait until a fresh status is wanted, for so many seconds at most.

        :return: whether there is a doubt; else it is just time
        """
        with anyio.move_on_after(seconds):
            await self._doubt.wait()
            # Who leaves rarely leaves alone: one status for all of them.
            await anyio.sleep(_GATHERED + _GATHERED_EACH * len(self._members))
        return self._doubt.is_set()

    def _place(self, channel: str) -> dict[str, Member]:
        if channel not in self._there and len(self._there) > _REMEMBERED:
            empty = (c for c, there in self._there.items() if not there and c != self._channel)
            if (longest_ago := next(empty, None)) is not None:
                del self._there[longest_ago]
        return self._there.setdefault(channel, {})

    def _names(self) -> dict[str, str | None]:
        return {id: member.username for id, member in self._members.items()}

    def _forget_the_gone(self) -> None:
        here = {id for there in self._there.values() for id in there}
        for id in self._members.keys() - here:
            del self._members[id]
