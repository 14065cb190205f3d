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
    the stream is. The broker tells of each subscription and not of each member, and an event can be
    lost, so the feed asks for a fresh status now and then; where that says something new, the
    :class:`PresenceStatus` is an item of the stream too.
    """

    def __init__(self, channel: str, buffer: int, overflow: Overflow) -> None:
        super().__init__(f"watch_presence({channel!r})", buffer, overflow)
        self._members: dict[str, Member] = {}
        self._known: dict[str, set[str]] = {}
        self._touched: set[str] = set()
        self._doubt = anyio.Event()

    @property
    def members(self) -> Mapping[str, Member]:
        """Who is there now, by the id of the connection; a view that stays up to date."""
        return MappingProxyType(self._members)

    # The side of the client

    def note(self, event: PresenceEvent) -> None:
        """Take in a change."""
        (member,) = event.who
        self._touched.add(member.id)
        known = self._known.get(member.id)
        if event.event == "subscribe":
            if member.id not in self._members:
                # It has come under our eyes, so all its channels are known.
                known = self._known[member.id] = set()
            self._members[member.id] = member
            if known is not None:
                known.add(event.channel)
            return
        if known is None or event.channel not in known:
            # It may be subscribed in other places below the channel: a status will tell.
            self.doubt()
        else:
            known.discard(event.channel)
            if known:
                return
        self._members.pop(member.id, None)
        self._known.pop(member.id, None)

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
        self._known = {id: known for id, known in self._known.items() if id in there}
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
