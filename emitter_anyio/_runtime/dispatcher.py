"""Delivering what a connection receives to streams, handlers and callers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller
from typing import Any, Final, TypeAlias

from anyio.lowlevel import checkpoint

from emitter_anyio._net.connection import Connection, Deliver
from emitter_anyio._protocol.packets import Event
from emitter_anyio._protocol.pending import Emission
from emitter_anyio._protocol.session import SYSTEM
from emitter_anyio._streams import Receiver, Sender
from emitter_anyio._values.batches import MessageBatch, make_batch
from emitter_anyio._values.errors import UnauthorizedError
from emitter_anyio._values.messages import EmitterMessage
from emitter_anyio._values.router import Routes

from .events import Events, logger
from .totals import Totals
from .trace import Trace

_Full: TypeAlias = tuple[Receiver[Any], list[EmitterMessage], int | None, int]
"""A full receiver, its messages, the weight of each, and how many messages it has taken."""

_is_system = methodcaller("startswith", SYSTEM)
"""Return whether a channel is below ``emitter/``, where the broker replies."""

FEED: Final = "feed"
"""The event for presence feeds, which get presence changes but no statuses."""

_MAX_ITEMS_PER_TURN: Final = 64
"""
The maximum number of messages that a formerly full stream gets together, and that are delivered one
by one before other tasks get a turn.
"""


class Dispatcher:
    """
    Delivers decoded packets in the order of their arrival.

    The reader awaits each delivery. A full stream delays the reader only while its consumer makes
    progress, or with ``overflow="block"``.

    :param routes: the receivers of each event
    :param events: emits events and reports errors
    :param totals: counts messages
    :param refused: called when the broker has refused a key without naming the packet
    :param trace: gets deliveries, dropped items and refusals
    """

    def __init__(
        self,
        routes: Routes[Receiver[Any]],
        events: Events,
        totals: Totals,
        refused: Callable[[], None],
        trace: Trace,
    ) -> None:
        self._routes = routes
        self._events = events
        self._totals = totals
        self._refused = refused
        self._trace = trace

    def deliver_for(self, connection: Connection) -> Deliver:
        """Return the function that delivers the decoded packets of a connection."""
        if not self._trace:
            return partial(self.deliver, connection)

        async def deliver(events: Sequence[Event]) -> None:
            with self._trace.span("deliver", packets=len(events)):
                await self.deliver(connection, events)

        return deliver

    async def deliver(self, connection: Connection, events: Sequence[Event]) -> None:
        """
        Deliver decoded packets.

        :raises ~anyio.ClosedResourceError: if the connection ends during the delivery
        """
        session = connection.session
        for event in events:
            if type(event) is MessageBatch:
                if session.replays or any(map(_is_system, event.by_channel)):
                    await self._deliver_one_by_one(connection, event.in_order)
                else:
                    await self._deliver_together(connection, event)
            elif type(event) is EmitterMessage and not _is_system(event.channel):
                await self._deliver_message(connection, event)
            else:
                for emission in session.receive(event):
                    await self._deliver_emission(connection, emission)

    async def _deliver_one_by_one(
        self, connection: Connection, messages: Sequence[EmitterMessage]
    ) -> None:
        session = connection.session
        together: list[EmitterMessage] = []
        alone = 0
        for message in messages:
            if session.replays or _is_system(message.channel):
                # This message can change how the following ones are delivered.
                if together:
                    await self._deliver_together(connection, make_batch(together))
                    together = []
                await self.deliver(connection, [message])
                alone += 1
                if alone % _MAX_ITEMS_PER_TURN == 0:
                    await checkpoint()
                    connection.check()
            else:
                together.append(message)
        if together:
            await self._deliver_together(connection, make_batch(together))

    async def _deliver_together(self, connection: Connection, messages: MessageBatch) -> None:
        self._totals.receive(len(messages.in_order))
        find = self._routes.messages.receivers
        receivers = {channel: find[channel] for channel in messages.by_channel}
        for channel, streams in receivers.items():
            if not streams:
                self._note_unhandled(channel, len(messages.by_channel[channel]))
        full: dict[int, list[_Full]] = {}
        """The full streams, by the id of the next message for each."""
        for stream, (some, each) in messages.by_receiver(receivers).items():
            if (taken := stream.push_many(some, each)) < len(some):
                full.setdefault(id(some[taken]), []).append((stream, some, each, taken))
        if not full:
            return
        # Go on in the order of the messages. Otherwise a consumer that reads several streams in
        # turn could wait for one of them while the reader waits for another.
        for next_id in filter(full.__contains__, map(id, messages.in_order)):
            for stream, some, each, taken in full.pop(next_id):
                await self._hand_over(connection, stream, some[taken])
                taken += 1
                taken += stream.push_many(some[taken : taken + _MAX_ITEMS_PER_TURN], each)
                if taken < len(some):
                    full.setdefault(id(some[taken]), []).append((stream, some, each, taken))

    async def _deliver_emission(self, connection: Connection, emission: Emission) -> None:
        event, value = emission
        if event == "message":
            await self._deliver_message(connection, value)
        elif event == "error":
            if isinstance(value, UnauthorizedError):
                self._refused()
            self._events.report(value)
        elif event == "refused":
            operation, channel, status = value
            self._trace(event, operation=operation, channel=channel, status=status)
        else:
            for stream in self._events.receivers(event, value):
                await self._hand_over(connection, stream, value)
            if event == "presence" and value.event != "status":
                for receiver in self._routes.reached(FEED, value.channel):
                    await self._hand_over(connection, receiver, value)

    async def _deliver_message(self, connection: Connection, message: EmitterMessage) -> None:
        self._totals.receive(1)
        streams = self._routes.messages.receivers[message.channel]
        replayed = connection.session.in_replay(message)
        full: list[Receiver[Any]] = []
        for stream in streams:
            if not stream.push(message, extra=replayed):
                full.append(stream)  # noqa: PERF401 - up to Python 3.11 that is a call
        # Offer the message to all streams before waiting for one of them.
        for stream in full:
            await self._hand_over(connection, stream, message)
        if not streams:
            self._note_unhandled(message.channel, 1)

    def _note_unhandled(self, channel: str, count: int) -> None:
        if not self._totals.unhandled:
            logger.warning(
                "a message on %r was dropped: no stream and no handler takes it; further ones are "
                "only counted, in statistics().unhandled",
                channel[:64],
            )
        self._totals.leave_unhandled(count)

    async def _hand_over(self, connection: Connection, stream: Receiver[Any], item: Any) -> None:
        if not stream.push(item):
            # Receivers other than streams are never full.
            assert isinstance(stream, Sender)
            if not stream.blocks:
                await stream.wait_for_space()
                connection.check()
            elif not await connection.pause_reading(stream.wait_for_space):
                return
            dropped = stream.dropped
            stream.push_or_drop(item)
            if stream.dropped > dropped:
                self._trace("dropped", stream=stream.what)
