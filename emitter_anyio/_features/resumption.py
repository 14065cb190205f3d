"""Reading the messages that were stored while the client was disconnected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final
from weakref import WeakSet

import anyio

from emitter_anyio._backend.tasks import is_cancelled, sleep
from emitter_anyio._protocol.pending import Grant
from emitter_anyio._runtime.background import Background
from emitter_anyio._runtime.events import Events, logger
from emitter_anyio._runtime.requester import DEFAULT, Requester
from emitter_anyio._runtime.slot import Slot
from emitter_anyio._runtime.supervisor import Restoring
from emitter_anyio._streams import Receiver, Sender
from emitter_anyio._values import requests
from emitter_anyio._values.channels import KeySource, unshare
from emitter_anyio._values.errors import ConnectionLostError, EmitterError, RequestError
from emitter_anyio._values.messages import EmitterMessage, Gap, ReplayedMessage, StoredMessage

from .gap import GapReader, NewestMessages
from .history import History
from .stored import Unreadable
from .watermark import RENEWAL_SECONDS, Watermark

_MAX_SKIPPED_MESSAGES: Final = 16
"""The maximum number of unreadably large messages to skip in search of a readable one."""

_NOT_RESUMED: Final = "the connection was lost again before the stored messages were read"
"""The reason of a gap until a resumption after it has completed."""


class Subscription:
    """
    One subscriber: its options, and the receiver of its messages.

    :param source: the key as the user gave it
    :param filter: the channel, preceded by its group if it is shared
    :param receiver: receives the messages; ``None`` stands for the handlers
    :param mark_gaps: whether to put a :class:`Gap` into the stream after a lost connection
    :param watermark: the last stored message that was certainly delivered, with ``resume=True``
    :param resume_limit: the maximum number of messages that a resumption delivers

    :ivar send: the receiver, if it is the send end of a stream
    """

    def __init__(
        self,
        source: KeySource,
        filter: str,
        receiver: Receiver[EmitterMessage | Gap] | None,
        *,
        mark_gaps: bool = False,
        watermark: Watermark | None = None,
        resume_limit: int = 0,
    ) -> None:
        self.source = source
        self.filter = filter
        self.channel = unshare(filter)[1]
        self.receiver = receiver
        self.send = receiver if isinstance(receiver, Sender) else None
        self.mark_gaps = mark_gaps
        self.watermark = watermark
        self.resume_limit = resume_limit
        self.grant: Grant | None = None
        """The subscription at the broker, which several subscribers can share."""
        self.held: Sequence[Sender[Any]] = ()
        """The streams that hold back live messages until the stored ones are delivered."""
        self.gap_reader: GapReader | None = None
        """The reader of the stored messages, while live ones are held back."""
        self.not_resumed = Gap(self.channel, reason=_NOT_RESUMED)
        """The item that marks a gap until a resumption has completed."""
        self._scopes: WeakSet[anyio.CancelScope] = WeakSet()

    @property
    def receivers(self) -> list[Receiver[EmitterMessage | Gap]]:
        """The receivers of the channel's messages."""
        return [each for each in (self.watermark, self.receiver) if each is not None]

    def set_grant(self, grant: Grant) -> None:
        """Note the subscription at the broker."""
        self.grant = grant

    def clear_grant(self) -> Grant | None:
        """Forget the subscription at the broker, and return it."""
        grant, self.grant = self.grant, None
        return grant

    def scope(self) -> anyio.CancelScope:
        """Make a cancel scope that is cancelled when the subscription ends."""
        scope = anyio.CancelScope()
        self._scopes.add(scope)
        return scope

    def hold(self, streams: Sequence[Sender[Any]], gap_reader: GapReader) -> None:
        """Hold back live messages in streams until a gap has been read."""
        self.held = streams
        self.gap_reader = gap_reader
        for stream in streams:
            stream.hold()

    def release(self) -> None:
        """Deliver the live messages that were held back."""
        held, self.held = self.held, ()
        self.gap_reader = None
        for stream in held:
            stream.release()

    def end(self) -> None:
        """Cancel the tasks of the subscription."""
        self.release()
        for scope in self._scopes:
            scope.cancel()


class Resumption:
    """
    The delivery of stored messages of a gap, before the live messages that follow it.

    :param slot: the current connection
    :param requester: sends requests
    :param history: reads stored messages
    :param events: the streams of handlers
    :param background: runs tasks
    """

    def __init__(
        self,
        slot: Slot,
        requester: Requester,
        history: History,
        events: Events,
        background: Background,
    ) -> None:
        self._slot = slot
        self._requester = requester
        self._history = history
        self._events = events
        self._background = background

    async def prepare(self, subscription: Subscription, key: str) -> None:
        """Note the newest stored message, before SUBSCRIBE is sent."""
        if subscription.watermark is not None:
            subscription.watermark.begin(await self._newest_stored(key, subscription.channel))

    def start(self, subscription: Subscription, grant: Grant) -> None:
        """Start the task that keeps the watermark of a subscription."""
        if (watermark := subscription.watermark) is not None:
            arguments = subscription, watermark, grant, subscription.scope()
            self._background.start_soon(self._keep_watermark, *arguments)

    def note_loss(self, subscription: Subscription) -> None:
        """Mark a gap, because the connection was lost."""
        if subscription.watermark is not None and not subscription.held:
            # _deliver() marks the gap, with its result.
            return
        if subscription.mark_gaps and subscription.send is not None:
            gap = subscription.not_resumed if subscription.held else Gap(subscription.channel)
            subscription.send.push(gap, extra=True)

    def hold(self, subscription: Subscription) -> None:
        """Hold back the live messages of a new connection until the stored ones are delivered."""
        watermark, own = subscription.watermark, subscription.send
        if watermark is not None and not subscription.held:
            streams = self._events.message_listeners() if own is None else (own,)
            # Resumed messages of earlier gaps that are still buffered count as well.
            count = max((stream.extra[0] for stream in streams), default=0)
            size = max((stream.extra[1] for stream in streams), default=0)
            messages = NewestMessages(subscription.resume_limit, count, size)
            reader = GapReader(self._history, subscription.channel, watermark, messages)
            subscription.hold(streams, reader)

    def resume(self, restoring: Restoring, subscription: Subscription, grant: Grant) -> None:
        """Deliver the stored messages of the gap, in a task that ends with the connection."""
        if (reader := subscription.gap_reader) is not None:
            arguments = subscription, reader, grant, subscription.scope()
            restoring.start_soon(self._resume, restoring.requester, *arguments)

    async def _newest_stored(self, key: str, channel: str) -> StoredMessage | None:
        try:
            request = requests.history(key, channel, last=1)
            found = await self._requester.request(request, DEFAULT)
        except RequestError as exc:
            if exc.status is not None:
                raise
            # The message is too large for the broker to send. An older one serves as well.
            reader = self._history.reader(
                self._requester, key, channel, _MAX_SKIPPED_MESSAGES, None
            )
            while isinstance(newest := await reader.next(), Unreadable):
                pass
            return newest
        return found[-1] if found else None

    async def _keep_watermark(
        self,
        subscription: Subscription,
        watermark: Watermark,
        grant: Grant,
        scope: anyio.CancelScope,
    ) -> None:
        with scope:
            while not is_cancelled():
                await watermark.stale.wait()
                if not await sleep(RENEWAL_SECONDS):
                    return
                connection = self._slot.connection
                try:
                    newest = await self._newest_stored(grant.key, subscription.channel)
                except EmitterError:
                    # The old watermark is still correct.
                    continue
                if connection is self._slot.connection and not subscription.held:
                    watermark.renew(newest)

    async def _resume(
        self,
        requester: Requester,
        subscription: Subscription,
        reader: GapReader,
        grant: Grant,
        scope: anyio.CancelScope,
    ) -> None:
        with scope:
            try:
                found, reason = await reader.read(requester, grant.key)
            except ConnectionLostError:
                # The next connection continues.
                return
            self._deliver(subscription, found, reason)

    def _deliver(
        self, subscription: Subscription, found: Sequence[StoredMessage], reason: str | None
    ) -> None:
        channel, own = subscription.channel, subscription.send
        if reason is None:
            logger.info("resumed %r (stored messages: %d)", channel, len(found))
        else:
            logger.warning("resumed %r incompletely: %s", channel, reason)
        if subscription.mark_gaps and own is not None:
            gap = Gap(channel, len(found), reason is None, reason)
            own.put_ahead([gap])
            # A resumption reads everything since the last completed one, so its result also applies
            # to the gaps that are held back.
            own.replace_held(subscription.not_resumed, replace(gap, resumed=0))
        for message in map(make_replayed, found):
            streams = self._events.message_listeners(message) if own is None else (own,)
            for stream in streams:
                stream.put_ahead([message])
        subscription.release()


def make_replayed(stored: StoredMessage) -> ReplayedMessage:
    """Convert a stored message to the message that a subscriber receives."""
    return ReplayedMessage(stored.channel, stored.binary, stored.id)
