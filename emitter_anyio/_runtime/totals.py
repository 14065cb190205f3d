"""The figures of a client over all its connections and streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from emitter_anyio._streams import Receiver, Sender
from emitter_anyio._values.messages import EmitterMessage
from emitter_anyio._values.router import Routes

from .slot import Slot


@dataclass(frozen=True, slots=True)
class Statistics:
    """
    Figures of a client since it was made.

    :ivar received: the number of messages that the broker has delivered
    :ivar unhandled: how many of them no stream and no handler took
    :ivar dropped: the number of items that streams and handlers have dropped because their buffer
        was full
    :ivar nonsense: the number of packets and replies that the broker would not send
    :ivar queued_bytes: the number of bytes that wait to be written
    :ivar pending: the number of outstanding acknowledgements
    :ivar links: the number of connections so far
    :ivar uncertain: the number of QoS 0 publishes that were being written when a connection was
        lost: the broker might have read them or not, and they are not sent again
    :ivar unsent: the number of QoS 0 publishes that were given up, because there was no other
        connection
    """

    received: int
    unhandled: int
    dropped: int
    nonsense: int
    queued_bytes: int
    pending: int
    links: int
    uncertain: int
    unsent: int


class Totals:
    """
    Counts what outlives a connection or a stream.

    :param slot: has the present connection, and keeps what was not read before the final loss
    :param routes: has the streams
    """

    def __init__(self, slot: Slot, routes: Routes[Receiver[Any]]) -> None:
        self._slot = slot
        self._routes = routes
        self.received = 0
        self.unhandled = 0
        self.dropped = 0
        self.nonsense = 0
        self.links = 0
        self.uncertain = 0
        self.unsent = 0

    def receive(self, count: int) -> None:
        """Count messages."""
        self.received += count

    def leave_unhandled(self, count: int) -> None:
        """Count messages that no stream and no handler took."""
        self.unhandled += count

    def open_connection(self) -> None:
        """Count a connection."""
        self.links += 1

    def end_connection(self, nonsense: int) -> None:
        """Add the figures of a connection that has ended."""
        self.nonsense += nonsense

    def doubt(self, count: int) -> None:
        """Count publishes that the broker might not have read."""
        self.uncertain += count

    def give_up(self, count: int) -> None:
        """Count publishes that were never sent."""
        self.unsent += count

    def leave_stream(self, send: Sender[Any]) -> None:
        """Add the figures of a stream that was left, and keep what was unread at the final loss."""
        if self._slot.lost is not None:
            self._slot.keep_unread(
                [item for item in send.drain() if isinstance(item, EmitterMessage)]
            )
        self.dropped += send.dropped

    def statistics(self) -> Statistics:
        """Return the figures, with those of the present connection and the open streams."""
        connection = self._slot.connection
        session = None if connection is None else connection.session
        return Statistics(
            received=self.received,
            unhandled=self.unhandled,
            dropped=self.dropped + sum(stream.dropped for stream in self._routes),
            nonsense=self.nonsense + (0 if session is None else session.nonsense),
            queued_bytes=0 if connection is None else connection.writer.size,
            pending=0 if session is None else session.pending,
            links=self.links,
            uncertain=self.uncertain,
            unsent=self.unsent,
        )
