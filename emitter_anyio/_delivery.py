"""What comes in, and to whom it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any, Final, TypeAlias

from anyio.lowlevel import checkpoint

from ._batches import Messages, in_one_go
from ._connection import Connection
from ._errors import UnauthorizedError
from ._events import EventSource, logger
from ._keys import KeyRing
from ._messages import EmitterMessage
from ._options import Options
from ._packets import Event, Packet
from ._pending import Emission, Pending
from ._presence import PresenceFeed
from ._router import Router
from ._session import SYSTEM, Session
from ._subscription import EventStream

_Crowded: TypeAlias = tuple[EventStream[Any], list[EmitterMessage], int | None, int]
"""A stream, what has come for it, how large each is, and how many of them have found room."""

_is_system = methodcaller("startswith", SYSTEM)
"""Tells whether the broker itself speaks on a channel."""

_SOME: Final = 64
"""So many are offered at a time to a stream that has had no room, and at most so many are delivered
one by one before other tasks get a turn."""


class Delivery(EventSource):
    """What the events of a link become: messages in streams, answers to those who wait."""

    def __init__(self, options: Options) -> None:
        super().__init__(options.matcher)
        self._options = options
        self._connection: Connection | None = None
        self._session = self._new_session()
        self._keys = KeyRing()
        self._feeds: Router[PresenceFeed] = Router(options.matcher)
        self._unread: list[EmitterMessage] = []
        """What was received and not read when the link was lost for good."""
        self._lost: str | None = None
        """Why there will be no link any more."""
        self._received = 0
        self._unhandled = 0
        self._dropped = 0

    def _new_session(self) -> Session:
        return Session(
            self._send_packet,
            matcher=self._options.matcher,
            allow_collisions=self._options.allow_collisions,
        )

    def _send_packet(self, packet: Packet) -> None:
        # Not by _link(): behind DISCONNECT nothing leaves, and what is given back then need not.
        assert self._connection is not None
        self._connection.send(packet)

    def _send_publish(self, topic: bytes, payload: bytes, retain: bool = False) -> None:
        assert self._connection is not None
        packet = self._connection.encode_publish(topic, payload, retain, None)
        self._session.published += 1
        self._connection.writer.write(packet)

    def _send_confirmed(
        self,
        topic: bytes,
        payload: bytes,
        key: str | None,
        channel: str | None,
        retain: bool = False,
    ) -> Pending[None]:
        assert self._connection is not None
        pending, packet_id = self._session.expect_confirmation(key, channel)
        try:
            packet = self._connection.encode_publish(topic, payload, retain, packet_id)
        except BaseException:
            self._session.forget(packet_id)
            raise
        self._connection.writer.write(packet)
        return pending

    def _ping(self, answered: Callable[[], None]) -> None:
        self._session.ping(awaited=False).call_when_done(answered)

    async def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            if type(event) is Messages:
                if self._session.replays or any(map(_is_system, event.by_channel)):
                    await self._deliver_in_turn(event.in_order)
                else:
                    await self._deliver_together(event)
            elif type(event) is EmitterMessage and not _is_system(event.channel):
                await self._deliver_message(event)
            else:
                for emission in self._session.receive(event):
                    await self._deliver_emission(emission)

    async def _deliver_in_turn(self, messages: Sequence[EmitterMessage]) -> None:
        together: list[EmitterMessage] = []
        alone = 0
        for message in messages:
            if self._session.replays or _is_system(message.channel):
                # What comes behind this one may go another way.
                if together:
                    await self._deliver_together(in_one_go(together))
                    together = []
                await self._deliver([message])
                alone += 1
                if alone % _SOME == 0:
                    await self._give_a_turn()
            else:
                together.append(message)
        if together:
            await self._deliver_together(in_one_go(together))

    async def _give_a_turn(self) -> None:
        await checkpoint()
        assert self._connection is not None
        self._connection.check()

    async def _deliver_together(self, messages: Messages) -> None:
        self._received += len(messages.in_order)
        find = self._routers["message"].receivers
        receivers = {channel: find[channel] for channel in messages.by_channel}
        for channel, streams in receivers.items():
            if not streams:
                self._note_unhandled(channel, len(messages.by_channel[channel]))
        # By the id of the message that is next for them.
        crowded: dict[int, list[_Crowded]] = {}
        for stream, (some, each) in messages.by_receiver(receivers).items():
            if (taken := stream.push_many(some, each)) < len(some):
                crowded.setdefault(id(some[taken]), []).append((stream, some, each, taken))
        if not crowded:
            return
        # In the order in which they came: who reads several streams by turns would else wait for
        # one, while the link waits for another.
        for next_one in filter(crowded.__contains__, map(id, messages.in_order)):
            for stream, some, each, taken in crowded.pop(next_one):
                await self._hand_over(stream, some[taken])
                taken += 1
                taken += stream.push_many(some[taken : taken + _SOME], each)
                if taken < len(some):
                    crowded.setdefault(id(some[taken]), []).append((stream, some, each, taken))

    async def _deliver_emission(self, emission: Emission) -> None:
        if emission.event == "message":
            await self._deliver_message(emission.value)
        elif emission.event == "error":
            if isinstance(emission.value, UnauthorizedError):
                self._keys.doubt()
            self._report(emission.value)
        else:
            for stream in self._receivers(emission.event, emission.value):
                await self._hand_over(stream, emission.value)
            if emission.event == "presence":
                await self._deliver_presence(emission.value)

    async def _deliver_message(self, message: EmitterMessage) -> None:
        self._received += 1
        streams = self._routers["message"].receivers[message.channel]
        replayed = self._session.in_replay(message)
        full: list[EventStream[Any]] = []
        for stream in streams:
            if not stream.push(message, extra=replayed):
                full.append(stream)  # noqa: PERF401 - up to Python 3.11 that is a call
        # All have been offered it before one of them is waited for.
        for stream in full:
            await self._hand_over(stream, message)
        if not streams:
            self._note_unhandled(message.channel, 1)

    def _note_unhandled(self, channel: str, count: int) -> None:
        if not self._unhandled:
            logger.warning(
                "a message from %r reached no stream and no handler; it and the like are counted "
                "in statistics().unhandled",
                channel[:64],
            )
        self._unhandled += count

    async def _deliver_presence(self, event: Any) -> None:
        if event.event == "status":
            return
        for feed in self._feeds.receivers[event.channel]:
            feed.note(event)
            await self._hand_over(feed, event)

    async def _hand_over(self, stream: EventStream[Any], item: Any) -> None:
        if not stream.push(item):
            link = self._connection
            assert link is not None
            if not stream.blocks:
                await stream.make_room()
                link.check()
            elif not await link.hold_up(stream.make_room):
                return
            stream.push_or_drop(item)

    def _streams(self) -> list[EventStream[Any]]:
        handlers = {id(registration.stream) for registration in self._registrations}
        found: list[EventStream[Any]] = [*self._feeds]
        # statistics() may ask in another thread: nothing is walked while it may change.
        for router in [*self._routers.values()]:
            found += [stream for stream in [*router] if id(stream) not in handlers]
        return found

    def _leave_stream(self, stream: EventStream[Any]) -> None:
        if self._lost is not None:
            known = {id(message) for message in self._unread}
            self._unread += [
                item
                for item in stream.drain()
                if isinstance(item, EmitterMessage) and id(item) not in known
            ]
        self._dropped += stream.dropped
        stream.close()
