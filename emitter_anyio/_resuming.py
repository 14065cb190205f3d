"""Subscriptions that outlive a link: restored, and what was stored meanwhile is read back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final
from weakref import WeakSet

import anyio

from . import _requests as requests
from ._buffer import MAX_BYTES, weight_of
from ._channels import Key, unshare
from ._conversation import DEFAULT
from ._errors import ConnectionLostError, EmitterError, RequestError, UnauthorizedError
from ._events import logger
from ._history import Historian
from ._messages import EmitterMessage, Gap, ReplayedMessage, StoredMessage
from ._options import Options
from ._pending import Grant
from ._reconnecting import Restoration
from ._stored import Unread
from ._subscription import EventStream
from ._watermark import RENEWED, Watermark

_ALL: Final = 2**20
"""As many stored messages as there may be; a broker that invents them comes to an end."""

_MOST_SKIPPED: Final = 16
"""So many messages too large to be read back are passed over to find a smaller one."""

_NOT_RESUMED: Final = "the link was lost again before what was stored could be read back"
"""The reason of a gap behind which no resumption has ended yet."""
_EXPIRED: Final = "the last message known to have come is not stored any more, nor might others be"


class Subscription:
    """
    What one subscriber has asked for.

    :param source: the key as the user gave it
    :param filter: the channel, with its group in front if it is shared
    :param stream: where its messages go; ``None`` is to the handlers
    """

    def __init__(
        self, source: Key, filter: str, stream: EventStream[EmitterMessage | Gap] | None
    ) -> None:
        self.source = source
        self.filter = filter
        self.channel = unshare(filter)[1]
        self.stream = stream
        self.mark_gaps = False
        self.watermark: Watermark | None = None
        self.resume_limit = 0
        self.grant: Grant | None = None
        self.held: Sequence[EventStream[Any]] = ()
        """What waits behind the stored messages that a gap would have lost."""
        self._scopes: WeakSet[anyio.CancelScope] = WeakSet()

    def scope(self) -> anyio.CancelScope:
        """Make a scope that ends with the subscription."""
        scope = anyio.CancelScope()
        self._scopes.add(scope)
        return scope

    def let_through(self) -> None:
        """Hold back no longer what comes."""
        held, self.held = self.held, ()
        for stream in held:
            stream.release()

    def end(self) -> None:
        """End what is done for it."""
        self.let_through()
        for scope in self._scopes:
            scope.cancel()
        if self.watermark is not None:
            self.watermark.close()


class Resumer(Historian):
    """What subscriptions are when a link is lost: restored, and those that want it resumed."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._subscriptions: dict[Subscription, None] = {}
        self._awaited: dict[tuple[Key, str], Subscription] = {}
        self._restorers.append(self._restore_subscriptions)

    def _begin(self) -> None:
        super()._begin()
        self._subscriptions.clear()
        self._awaited.clear()

    def _finish(self) -> None:
        super()._finish()
        for subscription in self._awaited.values():
            self._forget(subscription)

    def _forget(self, subscription: Subscription) -> None:
        self._subscriptions.pop(subscription, None)
        subscription.end()
        for receiver in (subscription.watermark, subscription.stream):
            if receiver is not None:
                self._routers["message"].discard(receiver)

    def _link_lost(self) -> None:
        super()._link_lost()
        for receiver in (*self._routers["message"], *self._feeds):
            receiver.note_gap()
        for subscription in self._subscriptions:
            if subscription.watermark is not None:
                subscription.watermark.doubt()
                if not subscription.held:
                    # The gap is marked when it is resumed.
                    continue
            if subscription.mark_gaps and subscription.stream is not None:
                reason = _NOT_RESUMED if subscription.held else None
                subscription.stream.push(Gap(subscription.channel, reason=reason), extra=True)

    def _restore_subscriptions(self) -> Iterable[Restoration]:
        for subscription in self._subscriptions:
            if subscription.watermark is not None and not subscription.held:
                # What is live waits behind what was stored meanwhile.
                stream = subscription.stream
                subscription.held = self._message_listeners() if stream is None else (stream,)
                for held in subscription.held:
                    held.hold()
        for grant in self._session.restore():
            yield Restoration(
                f"the subscription to {grant.filter!r}",
                partial(self._restore_grant, grant),
                partial(self._grant_refused, grant),
            )

    def _message_listeners(self) -> tuple[EventStream[Any], ...]:
        return tuple(one for one in self._routers["message"] if one in self._listeners)

    async def _restore_grant(self, grant: Grant) -> None:
        try:
            await self._answer(grant.asked, DEFAULT)
        except UnauthorizedError:
            key = await self._key_of(grant.source, grant.key)
            if key == grant.key or not grant.users:
                raise
            self._session.ask_again(grant, key)
            await self._answer(grant.asked, DEFAULT)
        assert self._link_tasks is not None
        for subscription in self._users(grant):
            if (watermark := subscription.watermark) is not None:
                # Cut short with the link: the next one does it all again.
                scope = subscription.scope()
                assert self._tasks is not None
                arguments = subscription, watermark, grant, scope
                self._link_tasks.start_soon(self._tasks.run, self._resume, *arguments)

    def _grant_refused(self, grant: Grant, error: Exception) -> None:
        self._session.drop(grant)
        for subscription in self._users(grant):
            self._forget(subscription)
            if subscription.stream is not None:
                subscription.stream.end(lambda: error)
            else:
                self._awaited.pop((subscription.source, subscription.filter), None)
                self._emit("error", error)

    def _users(self, grant: Grant) -> list[Subscription]:
        return [one for one in self._subscriptions if one.grant is grant]

    async def _newest_stored(self, key: str, channel: str) -> StoredMessage | None:
        try:
            found = await self._request(requests.history(key, channel, last=1), DEFAULT)
        except RequestError as exc:
            if exc.status is not None:
                raise
            # It is too large for the broker to send. The one before it will do.
            reader = self._reader(key, channel, _MOST_SKIPPED, None)
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
                link = self._connection
                try:
                    newest = await self._newest_stored(grant.key, subscription.channel)
                except EmitterError:
                    # The older one will do, until there is a link again.
                    continue
                if link is self._connection and not subscription.held:
                    watermark.renew(newest)

    async def _resume(
        self,
        subscription: Subscription,
        watermark: Watermark,
        grant: Grant,
        scope: anyio.CancelScope,
    ) -> None:
        """Deliver what was stored while the link was away, and then what waits behind it."""
        with scope, self._restoring():
            try:
                found, reason = await self._stored_behind(grant, watermark, subscription)
            except ConnectionLostError:
                # The next link does it all again.
                return
            watermark.resumed(found)
            self._put_resumed(subscription, found, reason)

    async def _stored_behind(
        self, grant: Grant, watermark: Watermark, subscription: Subscription
    ) -> tuple[list[StoredMessage], str | None]:
        """Give what may not have been delivered, the oldest first, and why some may be missing."""
        found: list[StoredMessage] = []
        # What an earlier gap has left unread counts, too.
        beside = [stream.beside for stream in subscription.held] or [(0, 0)]
        most = subscription.resume_limit - max(count for count, _ in beside)
        size = max(size for _, size in beside)
        reason = None
        known = watermark.since is None
        reader = self._reader(grant.key, grant.channel, _ALL, watermark.since)
        try:
            while (stored := await reader.next()) is not None:
                if isinstance(stored, Unread):
                    reason = reason or stored.reason
                    continue
                if not watermark.behind(stored):
                    known = known or watermark.is_at(stored)
                    continue
                size += weight_of([stored])
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

    def _put_resumed(
        self, subscription: Subscription, found: Sequence[StoredMessage], reason: str | None
    ) -> None:
        channel = subscription.channel
        if reason is None:
            logger.info("%r: resumed, with %d stored messages", channel, len(found))
        else:
            logger.warning("%r: resumed with a gap, since %s", channel, reason)
        if subscription.mark_gaps and subscription.stream is not None:
            gap = Gap(channel, len(found), reason is None, reason)
            subscription.stream.put_ahead([gap])
            # One resumption reads back what was stored in all gaps since the last resumption, so
            # its result holds for the gaps that are held too.
            subscription.stream.replace_held(
                Gap(channel, reason=_NOT_RESUMED), replace(gap, resumed=0)
            )
        for message in map(replayed, found):
            streams = (
                self._handler_streams("message", message)
                if subscription.stream is None
                else (subscription.stream,)
            )
            for stream in streams:
                stream.put_ahead([message])
        subscription.let_through()


def replayed(stored: StoredMessage) -> ReplayedMessage:
    return ReplayedMessage(stored.channel, stored.binary, stored.id)
