"""Reading back what was stored while there was no connection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final
from weakref import WeakSet

import anyio

from emitter_anyio._protocol.pending import Grant
from emitter_anyio._runtime.background import Background
from emitter_anyio._runtime.events import Events, logger
from emitter_anyio._runtime.requester import DEFAULT, Requester
from emitter_anyio._runtime.slot import Slot
from emitter_anyio._runtime.supervisor import Restoring
from emitter_anyio._streams import MAX_BYTES, Receiver, Sender, weight_of
from emitter_anyio._values import requests
from emitter_anyio._values.channels import Key, unshare
from emitter_anyio._values.errors import ConnectionLostError, EmitterError, RequestError
from emitter_anyio._values.messages import EmitterMessage, Gap, ReplayedMessage, StoredMessage

from .history import History
from .stored import Unread
from .watermark import RENEWED, Watermark

_MAX_READ: Final = 2**20
"""The most stored messages that are read, in case that a broker repeats itself."""

_MAX_SKIPPED: Final = 16
"""The most messages, too large to be read back, that are skipped to find a smaller one."""

_NOT_RESUMED: Final = "the link was lost again before what was stored could be read back"
"""The reason of a gap after which no resumption has completed yet."""

_EXPIRED: Final = "the last message known to have come is not stored any more, nor might others be"


class Subscription:
    """
    One subscriber: what it asked for, and where its messages go.

    :param source: the key as the user gave it
    :param filter: the channel, preceded by its group if it is shared
    :param receiver: where its messages go; ``None`` stands for the handlers
    :param mark_gaps: whether gaps are marked in the stream
    :param watermark: how far its messages have certainly been delivered, if it is to be resumed
    :param resume_limit: the most messages that a resumption delivers

    :ivar send: the receiver, if it is the send end of a stream
    """

    def __init__(
        self,
        source: Key,
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
        """What the broker was asked for."""
        self.held: Sequence[Sender[Any]] = ()
        """The streams in which live messages wait for the stored ones of a gap."""
        self.not_resumed = Gap(self.channel, reason=_NOT_RESUMED)
        """Marks a gap until a resumption has completed."""
        self._scopes: WeakSet[anyio.CancelScope] = WeakSet()

    @property
    def receivers(self) -> list[Receiver[EmitterMessage | Gap]]:
        """What receives the messages of its channel."""
        return [each for each in (self.watermark, self.receiver) if each is not None]

    def ask(self, grant: Grant) -> None:
        """Note what the broker was asked for."""
        self.grant = grant

    def give_back(self) -> Grant | None:
        """Forget what the broker was asked for; return it."""
        grant, self.grant = self.grant, None
        return grant

    def scope(self) -> anyio.CancelScope:
        """Make a cancel scope that ends with the subscription."""
        scope = anyio.CancelScope()
        self._scopes.add(scope)
        return scope

    def hold(self, streams: Sequence[Sender[Any]]) -> None:
        """Have live messages wait in streams for the stored ones."""
        self.held = streams
        for stream in streams:
            stream.hold()

    def release(self) -> None:
        """Let the live messages through."""
        held, self.held = self.held, ()
        for stream in held:
            stream.release()

    def end(self) -> None:
        """End the tasks of the subscription."""
        self.release()
        for scope in self._scopes:
            scope.cancel()


class Resumption:
    """
    Delivers the stored messages of a gap before the live messages that follow it.

    :param slot: the present connection
    :param requester: sends requests
    :param history: reads stored messages
    :param events: has the handlers' streams
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
        """Note the newest stored message, before the broker is asked to deliver others."""
        if subscription.watermark is not None:
            subscription.watermark.begin(await self._newest_stored(key, subscription.channel))

    def start(self, subscription: Subscription, grant: Grant) -> None:
        """Keep the watermark of a subscription."""
        if (watermark := subscription.watermark) is not None:
            arguments = subscription, watermark, grant, subscription.scope()
            self._background.start_soon(self._keep_watermark, *arguments)

    def lose(self, subscription: Subscription) -> None:
        """Mark a gap: the connection was lost."""
        if subscription.watermark is not None and not subscription.held:
            # The gap is marked when it is resumed.
            return
        if subscription.mark_gaps and subscription.send is not None:
            gap = subscription.not_resumed if subscription.held else Gap(subscription.channel)
            subscription.send.push(gap, extra=True)

    def hold(self, subscription: Subscription) -> None:
        """Have live messages of a new connection wait for the stored ones."""
        if subscription.watermark is not None and not subscription.held:
            own = subscription.send
            subscription.hold(self._events.message_listeners() if own is None else (own,))

    def resume(self, restoring: Restoring, subscription: Subscription, grant: Grant) -> None:
        """Deliver what was stored in the gap, in a task that ends with the connection."""
        if (watermark := subscription.watermark) is not None:
            # If the connection is lost again, the next one does all of it.
            arguments = subscription, watermark, grant, subscription.scope()
            restoring.start_soon(self._resume, restoring.requester, *arguments)

    async def _newest_stored(self, key: str, channel: str) -> StoredMessage | None:
        try:
            asked = requests.history(key, channel, last=1)
            found = await self._requester.request(asked, DEFAULT)
        except RequestError as exc:
            if exc.status is not None:
                raise
            # It is too large for the broker to send. The one before it serves as well.
            reader = self._history.reader(self._requester, key, channel, _MAX_SKIPPED, None)
            while isinstance(newest := await reader.next(), Unread):
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
            while True:
                await watermark.stale.wait()
                await anyio.sleep(RENEWED)
                connection = self._slot.connection
                try:
                    newest = await self._newest_stored(grant.key, subscription.channel)
                except EmitterError:
                    # The old watermark serves until there is a connection again.
                    continue
                if connection is self._slot.connection and not subscription.held:
                    watermark.renew(newest)

    async def _resume(
        self,
        requester: Requester,
        subscription: Subscription,
        watermark: Watermark,
        grant: Grant,
        scope: anyio.CancelScope,
    ) -> None:
        with scope:
            try:
                found, reason = await self._read_gap(requester, grant, watermark, subscription)
            except ConnectionLostError:
                # The next connection does all of it.
                return
            watermark.resumed(found)
            self._deliver(subscription, found, reason)

    async def _read_gap(
        self,
        requester: Requester,
        grant: Grant,
        watermark: Watermark,
        subscription: Subscription,
    ) -> tuple[list[StoredMessage], str | None]:
        """Return the messages that might not have been delivered, oldest first, and why some might
        be missing."""
        found: list[StoredMessage] = []
        # What an earlier gap has left unread counts as well.
        beside = [stream.extra for stream in subscription.held] or [(0, 0)]
        most = subscription.resume_limit - max(count for count, _ in beside)
        size = max(size for _, size in beside)
        reason = None
        known = watermark.since is None
        reader = self._history.reader(
            requester, grant.key, grant.channel, _MAX_READ, watermark.since
        )
        try:
            while (stored := await reader.next()) is not None:
                if isinstance(stored, Unread):
                    reason = reason or stored.reason
                    continue
                if not watermark.behind(stored):
                    known = known or watermark.is_at(stored)
                    continue
                size += weight_of(stored)
                if len(found) >= most:
                    limit = f"there are more than resume_limit={subscription.resume_limit}"
                    return found[::-1], limit
                if size > MAX_BYTES:
                    return found[::-1], "there are more than 8 MiB of them"
                found.append(stored)
        except ConnectionLostError:
            raise
        except EmitterError as exc:
            reason = str(exc)
        return found[::-1], reason or (None if known else _EXPIRED)

    def _deliver(
        self, subscription: Subscription, found: Sequence[StoredMessage], reason: str | None
    ) -> None:
        channel, own = subscription.channel, subscription.send
        if reason is None:
            logger.info("%r: resumed, with %d stored messages", channel, len(found))
        else:
            logger.warning("%r: resumed with a gap, since %s", channel, reason)
        if subscription.mark_gaps and own is not None:
            gap = Gap(channel, len(found), reason is None, reason)
            own.put_ahead([gap])
            # One resumption reads back everything since the last one that completed, so its result
            # holds for the gaps that wait in the stream as well.
            own.replace_held(subscription.not_resumed, replace(gap, resumed=0))
        for message in map(replayed, found):
            streams = self._events.message_listeners(message) if own is None else (own,)
            for stream in streams:
                stream.put_ahead([message])
        subscription.release()


def replayed(stored: StoredMessage) -> ReplayedMessage:
    """Make the message that a subscriber receives of a stored one."""
    return ReplayedMessage(stored.channel, stored.binary, stored.id)
