"""Statistics of a client over all its connections and streams."""

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
    Statistics of a client since it was created.

    :ivar received: the number of messages that the broker has delivered
    :ivar unhandled: the number of received messages that no stream and no handler took
    :ivar dropped: the number of items that were dropped because the buffer of a stream or handler
        was full
    :ivar nonsense: the number of invalid or unexpected packets and replies from the broker
    :ivar queued_bytes: the number of bytes that wait to be sent
    :ivar pending: the number of packets that the broker has not acknowledged yet
    :ivar connections: the number of connections that have been opened
    :ivar uncertain: the number of QoS 0 publishes that might not have reached the broker, because
        the connection ended while they were being sent; they are not sent again
    :ivar unsent: the number of QoS 0 publishes that were discarded because the client ended without
        another connection
    """

    received: int
    unhandled: int
    dropped: int
    nonsense: int
    queued_bytes: int
    pending: int
    connections: int
    uncertain: int
    unsent: int


class Totals:
    """
    Counters that outlive connections and streams.

    :param slot: has the current connection, and keeps the messages that were unread at the final
        loss
    :param routes: has the open streams
    """

    def __init__(self, slot: Slot, routes: Routes[Receiver[Any]]) -> None:
        self._slot = slot
        self._routes = routes
        self.received = 0
        self.unhandled = 0
        self.dropped = 0
        self.nonsense = 0
        self.connections = 0
        self.uncertain = 0
        self.unsent = 0

    def receive(self, count: int) -> None:
        """Count received messages."""
        self.received += count

    def leave_unhandled(self, count: int) -> None:
        """Count messages that no stream and no handler took."""
        self.unhandled += count

    def open_connection(self) -> None:
        """Count a new connection."""
        self.connections += 1

    def end_connection(self, nonsense: int) -> None:
        """Add the counters of a connection that has ended."""
        self.nonsense += nonsense

    def doubt(self, count: int) -> None:
        """Count publishes that might not have reached the broker."""
        self.uncertain += count

    def give_up(self, count: int) -> None:
        """Count publishes that were discarded."""
        self.unsent += count

    def leave_stream(self, send: Sender[Any]) -> None:
        """Add the counters of a closed stream, and keep what was unread at the final loss."""
        if self._slot.lost is not None:
            self._slot.keep_unread(
                [item for item in send.drain() if isinstance(item, EmitterMessage)]
            )
        self.dropped += send.dropped

    def statistics(self) -> Statistics:
        """Return the statistics, including the current connection and the open streams."""
        connection = self._slot.connection
        session = None if connection is None else connection.session
        return Statistics(
            received=self.received,
            unhandled=self.unhandled,
            dropped=self.dropped + sum(stream.dropped for stream in self._routes),
            nonsense=self.nonsense + (0 if session is None else session.nonsense),
            queued_bytes=0 if connection is None else connection.writer.size,
            pending=0 if session is None else session.pending,
            connections=self.connections,
            uncertain=self.uncertain,
            unsent=self.unsent,
        )
