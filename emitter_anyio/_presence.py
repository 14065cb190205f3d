"""The stream of who comes and goes, and the set of who is there."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import anyio

from ._requests import Member, PresenceEvent, PresenceStatus
from ._subscription import EventStream, Overflow

_GATHERED: Final = 0.1
"""For so many seconds doubts are gathered before a status is asked for."""


class PresenceFeed(EventStream[PresenceEvent]):
    """
    A stream of the changes of a channel's presence, the status first.

    :attr:`members` follows what the broker says as it comes in, however far behind the reader of
    the stream is. It is what a status tells: whom a message to the channel would reach, and so
    nobody below it, whose coming and going the stream tells too. No event tells of the subscribers
    of a parent, and one can be lost, so the feed asks for a fresh status now and then; where that
    says something new, the :class:`PresenceStatus` is an item of the stream too.
    """

    def __init__(self, channel: str, buffer: int, overflow: Overflow) -> None:
        super().__init__(f"watch_presence({channel!r})", buffer, overflow)
        self._channel = channel
        self._members: dict[str, Member] = {}
        self._touched: set[str] = set()
        self._doubt = anyio.Event()

    @property
    def members(self) -> Mapping[str, Member]:
        """Who is there now, by the id of the connection; a view that stays up to date."""
        return MappingProxyType(self._members)

    # The side of the client

    def note(self, event: PresenceEvent) -> None:
        """Take in a change."""
        if event.channel != self._channel:
            return
        (member,) = event.who
        self._touched.add(member.id)
        if event.event == "subscribe":
            self._members[member.id] = member
        else:
            # A subscription to a parent may still reach it: a status will tell.
            self._members.pop(member.id, None)
            self.doubt()

    def asking(self) -> None:
        """Note that a status is being asked for: what changes meanwhile, it may not know."""
        self._touched.clear()
        self._doubt = anyio.Event()

    def correct(self, status: PresenceStatus) -> bool:
        """Take in a status; tells whether it says something new."""
        there = {member.id: member for member in status.who}
        for id in self._touched:
            there.pop(id, None)
            if id in self._members:
                there[id] = self._members[id]
        if self._touched:
            self.doubt()
        if there == self._members:
            return False
        self._members.clear()
        self._members.update(there)
        return True

    def doubt(self) -> None:
        """Have a fresh status asked for."""
        self._doubt.set()

    async def doubted(self, seconds: float | None) -> None:
        """Wait until a fresh status is wanted, for so many seconds at most."""
        with anyio.move_on_after(seconds):
            await self._doubt.wait()
            # Who leaves rarely leaves alone: one status for all of them.
            await anyio.sleep(_GATHERED)
