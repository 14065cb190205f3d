"""What was asked of the broker and what is pending. Events in, packets out.

The session knows neither sockets nor tasks: it allots the packet ids, matches what the broker says
with what was asked, and counts who uses which subscription. The broker refuses *before* it
acknowledges, and names the packet (``req``), so an acknowledgement without a refusal before it is a
yes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

from . import _requests as requests
from ._channels import Key, format_topic, unshare
from ._checks import is_whole
from ._errors import (
    EmitterError,
    RemoteProtocolError,
    RequestError,
)
from ._errors import refusal as refusal_of
from ._grants import Grants
from ._hints import refused
from ._messages import EmitterMessage
from ._packets import (
    PINGREQ,
    Answer,
    ConnAck,
    Packet,
    PingResp,
    PubAck,
    Publish,
    SubAck,
    Subscribe,
    Undecodable,
    UnsubAck,
    Unsubscribe,
)
from ._pending import Emission, Grant, Pending, Replay
from ._requests import NonsenseError, Request
from ._router import Matcher, reaches

T = TypeVar("T")

SYSTEM: Final = "emitter/"
"""Below this the broker answers; anybody with a wide enough key may publish there too."""

_IDS: Final = 65535
_KEPT_IDS: Final = 4096


class Session(Grants):
    """
    The state of the conversation with the broker.

    :param send: takes each packet that is to leave, in order
    :param matcher: how the broker matches subscriptions
    :param allow_collisions: whether the broker keeps channels of the same fingerprint apart
    """

    def __init__(
        self,
        send: Callable[[Packet], None],
        *,
        matcher: Matcher = "emitter",
        allow_collisions: bool = False,
    ) -> None:
        super().__init__(matcher, allow_collisions=allow_collisions)
        self._send = send
        self._pending: dict[int, Pending[Any]] = {}
        self._pings: deque[Pending[RequestError | None]] = deque()
        self._last_id = 0
        self._when_free: list[Callable[[], None]] = []
        self.published = 0
        """How many publishes of QoS 0 there were on this link, which nothing answers."""
        self._settled = 0
        self._refusal: RequestError | None = None
        self.answered = 0
        """How many things that were asked have been acknowledged, on all links."""
        self.nonsense = 0
        """How many things came that the broker would not send."""
        self.connection_id: str | None = None

    # What is asked

    @property
    def pending(self) -> int:
        """How many acknowledgements are outstanding."""
        return len(self._pending) + len(self._pings)

    @property
    def unsettled(self) -> bool:
        """Tell whether the broker has yet to say that it has taken something published."""
        published = (one.operation.startswith("publish") for one in self._pending.values())
        return self.published > self._settled or any(published)

    @property
    def full(self) -> bool:
        """Tell whether packet ids are scarce: some are kept for what leaves without waiting."""
        return len(self._pending) >= _IDS - _KEPT_IDS

    def call_when_free(self, waker: Callable[[], None]) -> None:
        """Have a function called when a packet id is free again, or the link is lost."""
        self._when_free.append(waker)

    def expect_confirmation(
        self, key: str | None, channel: str | None
    ) -> tuple[Pending[None], int]:
        """
        Be ready for the answer to a publish of QoS 1, which the caller sends on its own.

        :param key: the key; ``None`` if it goes through a link
        :return: what is pending, and the packet's id
        """
        operation = "publish_with_link" if key is None else "publish"
        pending: Pending[None] = Pending(operation, key, channel, settles=self.published)
        return pending, self._register(pending)

    def forget(self, packet_id: int) -> None:
        """Free the id of a packet that could not be encoded and so was not sent."""
        del self._pending[packet_id]
        if self._when_free:
            self._tell_free()

    def request(self, request: Request[T], *, awaited: bool = True) -> Pending[T]:
        """Ask a control request."""
        pending: Pending[T] = Pending(
            request.operation,
            request.key,
            request.channel,
            request=request,
            settles=self.published,
            awaited=awaited,
        )
        topic = request.topic.encode()
        self._send_asking(pending, lambda packet_id: Publish(topic, request.body, packet_id))
        return pending

    def ping(self, *, awaited: bool = True) -> Pending[RequestError | None]:
        """
        Send a barrier; its value is the first refusal of a publish of QoS 0 since the last one
        that somebody waited for.
        """
        pending: Pending[RequestError | None] = Pending(
            "flush", settles=self.published, awaited=awaited
        )
        self._pings.append(pending)
        self._send(PINGREQ)
        return pending

    def subscribe(self, source: Key, key: str, filter: str, replay: Replay) -> tuple[Grant, bool]:
        """
        Use a subscription; the broker is asked once for each key and filter.

        :param source: the key as the user gave it
        :param key: the key itself
        :param filter: the channel, with its group in front if it is shared
        :return: the grant, and whether the replay has to come from a history request, since on
            the wire it would reach other subscribers too
        :raises SubscriptionConflictError: if the broker would mix it up with another one
        """
        others = self._grants.get(filter)
        if others is None:
            self._check_collision("subscription", filter, self._grants)
            self._check_groups(filter)
        shared = self.overlapped(filter) or self._is_deaf(filter)
        grant = None if others is None else others.get(source)
        if grant is None:
            grant = Grant(source, key, filter)
            self._ask_for(grant, Replay(last=0) if shared else replay)
        grant.users += 1
        return grant, shared and not replay.nothing

    def restore(self) -> list[Grant]:
        """
        Ask for every subscription again, on a new link.

        What is refused then is kept: whoever restores it asks again with another key, or drops it.

        :return: what was asked for
        """
        self._linked = True
        grants = [grant for by_source in self._grants.values() for grant in by_source.values()]
        for grant in grants:
            self._ask_for(grant, Replay(last=0))
        return grants

    def ask_again(self, grant: Grant, key: str) -> None:
        """Ask with another key for a subscription that was refused."""
        grant.key = key
        self._ask_for(grant, Replay(last=0))

    def drop(self, grant: Grant) -> None:
        """Give up a subscription that was refused, whoever uses it."""
        # It is not unsubscribed; another key, whose users have left, may have to be.
        grants = self._grants.get(grant.filter, {})
        if grants.get(grant.source) is grant:
            del grants[grant.source]
            self._tidy(grant.filter)

    def release(self, grant: Grant) -> Pending[None] | None:
        """
        Stop using a subscription.

        :return: the UNSUBSCRIBE, if that was the last user of the filter
        """
        grant.users -= 1
        return self._tidy(grant.filter)

    def unsubscribe(self, key: str, filter: str) -> Pending[None]:
        """Tell the broker to unsubscribe what nobody uses here."""
        pending: Pending[None] = Pending("unsubscribe", key, filter, settles=self.published)
        topic = format_topic(key, filter)
        self._send_asking(pending, lambda packet_id: Unsubscribe(packet_id, topic))
        return pending

    def awaited(self) -> list[Pending[Any]]:
        """Give what is not settled yet and somebody waits for."""
        asked = (*self._pending.values(), *self._pings)
        return [pending for pending in asked if pending.awaited and not pending.done]

    # What the broker says

    def receive(self, event: Answer) -> Iterable[Emission]:
        """
        Take in an event that is no ordinary message.

        :return: what is to be emitted
        :raises RemoteProtocolError: if the broker may not send it now
        """
        if isinstance(event, PubAck):
            return self._acknowledged(event.packet_id, PubAck)
        match event:
            case EmitterMessage():
                return self._receive_system(event)
            case UnsubAck(packet_id):
                return self._acknowledged(packet_id, UnsubAck)
            case SubAck(packet_id, codes):
                return self._acknowledged(packet_id, SubAck, codes)
            case PingResp():
                return self._pong()
            case Undecodable(size):
                return self._report(f"a message of {size} bytes whose topic is no UTF-8")
            case ConnAck():
                raise RemoteProtocolError("the broker sent a second CONNACK")
            case _:
                raise event

    def lost(self, error: Callable[[], Exception]) -> int:
        """
        The link is gone: what is pending fails, and the packet ids are free again.

        What was granted is kept, to be restored on the next link.

        :return: how many publishes of QoS 0 the broker is not known to have taken
        """
        self._forget_link()
        pending = [*self._pending.values(), *self._pings]
        self._pending.clear()
        self._pings.clear()
        self._tell_free()
        unsettled = self.published - self._settled
        self.published = self._settled = 0
        self.connection_id = None
        for one in pending:
            one.fail(error)
        return unsettled

    # How

    def _ask_for(self, grant: Grant, replay: Replay) -> None:
        topic = format_topic(grant.key, grant.filter, replay.options)
        pending: Pending[None] = Pending(
            "subscribe", grant.key, grant.filter, settles=self.published
        )
        self._send_asking(pending, lambda packet_id: Subscribe(packet_id, topic))
        pending.grant, grant.asked, grant.refused = grant, pending, False
        if not replay.nothing:
            self.replays.add(grant)
        self._grants.setdefault(grant.filter, {})[grant.source] = grant

    def _send_asking(self, pending: Pending[Any], make: Callable[[int], Packet]) -> None:
        packet_id = self._register(pending)
        try:
            self._send(make(packet_id))
        except BaseException:
            self.forget(packet_id)
            raise

    def _register(self, pending: Pending[Any]) -> int:
        if len(self._pending) >= _IDS:
            raise RuntimeError("every packet id is taken by what the broker has not acknowledged")
        packet_id = self._last_id
        while True:
            packet_id = packet_id % _IDS + 1
            if packet_id not in self._pending:
                break
        self._last_id = packet_id
        self._pending[packet_id] = pending
        return packet_id

    def _tell_free(self) -> None:
        wakers, self._when_free = self._when_free, []
        for waker in wakers:
            waker()

    def _tidy(self, filter: str) -> Pending[None] | None:
        """Unsubscribe a filter that nobody uses any more, under whichever key."""
        grants = self._grants.get(filter, {})
        if any(grant.users for grant in grants.values()):
            return None
        self._grants.pop(filter, None)
        if not self._linked:
            # The broker has forgotten all of it with the link.
            return None
        # A key that is granted will do. Of those that may be refused yet, any may be the good one;
        # if the SUBSCRIBE is going to be refused, so is the UNSUBSCRIBE, and that is no news.
        usable = [grant for grant in grants.values() if not grant.refused]
        granted = [grant for grant in usable if grant.asked.done]
        pending: Pending[None] | None = None
        for grant in granted[:1] or usable:
            pending = self.unsubscribe(grant.key, filter)
            pending.awaited = False
            pending.quiet = not grant.asked.done
        return pending

    def _acknowledged(
        self, packet_id: int, kind: type[Answer], codes: tuple[int, ...] = ()
    ) -> Iterable[Emission]:
        pending = self._pending.get(packet_id)
        if pending is None or kind is not _ACKNOWLEDGED_BY.get(pending.operation, PubAck):
            return self._report(f"a {kind.__name__.upper()} for a packet that was not sent")
        self.forget(packet_id)
        self.answered += 1
        if pending.settles > self._settled:
            self._settled = pending.settles
        if pending.done:
            return ()
        refusal = pending.refusal
        if kind is SubAck:
            denied = not codes or codes[0] >= 0x80
            refusal = (refusal or (None, "the broker refused without a reason")) if denied else None
            # Only subscribe() waits for a SUBACK, and it has made a grant.
            assert pending.grant is not None
            self.replays.discard(pending.grant)
            pending.grant.refused = denied
            if not denied:
                pending.grant.granted = True
            elif not pending.grant.granted:
                self.drop(pending.grant)
        if refusal is not None:
            return self._refuse(pending, *refusal)
        if pending.request is None:
            pending.succeed(None)
        else:
            pending.fail(lambda: _unanswered(pending))
        return ()

    def _pong(self) -> Iterable[Emission]:
        if not self._pings:
            return self._report("a PINGRESP without a PINGREQ")
        ping = self._pings.popleft()
        self._settled = max(self._settled, ping.settles)
        refusal = None
        if ping.awaited:
            refusal, self._refusal = self._refusal, None
        ping.succeed(refusal)
        return ()

    def _receive_system(self, message: EmitterMessage) -> Iterable[Emission]:
        operation = message.channel[len(SYSTEM) :].partition("?")[0].rstrip("/")
        try:
            answer = requests.parse_object(message.binary)
            req = answer.get("req")
            if req is None:
                emissions = self._unasked(operation, answer)
            else:
                emissions = self._answered(operation, req, answer)
        except NonsenseError as exc:
            return self._stray(message, str(exc))
        return self._stray(message, "nobody asked for it") if emissions is None else emissions

    def _answered(self, operation: str, req: object, answer: Any) -> Iterable[Emission] | None:
        pending = self._pending.get(req) if is_whole(req) else None
        if pending is None:
            return None
        request = pending.request
        if request is None:
            if operation != "error":
                return None
            pending.refusal = pending.refusal or requests.refusal_in(answer)
            return ()
        if operation != request.operation:
            return None
        if pending.done:
            return ()
        try:
            refusal = requests.refusal_in(answer)
            value = None if refusal else request.parse(answer)
        except NonsenseError as exc:
            pending.nonsense = str(exc)
            raise
        if refusal:
            return self._refuse(pending, *refusal)
        if isinstance(value, requests.Me):
            self.connection_id = value.id
        pending.succeed(value)
        if value is None or not pending.awaited or not request.emits:
            return ()
        return (Emission(request.operation, value),)

    def _unasked(self, operation: str, answer: Any) -> Iterable[Emission] | None:
        if operation == "presence":
            event = requests.presence_event(answer)
            if any(reaches(feed, event.channel, self._matcher) for feed in self._feeds):
                return (Emission("presence", event),)
            if any(reaches(feed, event.channel, self._matcher) for feed in self._left_feeds):
                # It was on its way when the feed was left.
                return ()
        elif operation == "error" and self.published > self._settled:
            refusal = requests.refusal_in(answer)
            if refusal is not None:
                status, words = refusal
                error = refusal_of(
                    status,
                    words,
                    operation="publish",
                    hint="one of the publishes of qos=0; qos=1, or flush() behind it, tells which",
                )
                self._refusal = self._refusal or error
                return (Emission("error", error),)
        return None

    def _stray(self, message: EmitterMessage, why: str) -> Iterable[Emission]:
        # A wide subscription ("+/") receives what its users publish below "emitter/" too.
        channels = (unshare(filter)[1] for filter in self._grants)
        if any(reaches(channel, message.channel, self._matcher) for channel in channels):
            return (Emission("message", message),)
        return self._report(f"a message on {message.channel[:64]!r}: {why}")

    def _report(self, what: str) -> Iterable[Emission]:
        self.nonsense += 1
        if self.nonsense > 1:
            return ()
        error = RemoteProtocolError(f"the broker sent {what}; this and the like are dropped")
        return (Emission("error", error),)

    def _refuse(self, pending: Pending[Any], status: int | None, words: str) -> Iterable[Emission]:
        def error() -> RequestError:
            return refused(status, words, pending.operation, pending.key, pending.channel)

        pending.fail(error)
        return () if pending.awaited or pending.quiet else (Emission("error", error()),)


_ACKNOWLEDGED_BY: Final[dict[str, type[Answer]]] = {"subscribe": SubAck, "unsubscribe": UnsubAck}


def _unanswered(pending: Pending[Any]) -> EmitterError:
    if pending.nonsense is not None:
        return RemoteProtocolError(
            f"{pending.operation}: what the broker answered is nonsense: {pending.nonsense}"
        )
    return RequestError(
        None,
        "acknowledged without an answer: it was too large for the broker to send (64 KiB)",
        operation=pending.operation,
        channel=pending.channel,
    )
