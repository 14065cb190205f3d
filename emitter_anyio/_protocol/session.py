"""The MQTT session of a connection. No I/O.

The session allocates packet ids and matches replies to requests. The broker sends a refusal, with
the packet id as ``req``, *before* it acknowledges the packet. Therefore, an acknowledgement without
a refusal before it means success.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias, TypeVar

from emitter_anyio._values import requests
from emitter_anyio._values.channels import KeySource, format_topic
from emitter_anyio._values.checks import is_int
from emitter_anyio._values.errors import (
    EmitterError,
    RemoteProtocolError,
    RequestError,
    make_request_error,
)
from emitter_anyio._values.hints import make_refusal
from emitter_anyio._values.messages import EmitterMessage
from emitter_anyio._values.requests import InvalidReplyError, Request
from emitter_anyio._values.router import overlap, reaches

from .packets import (
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
from .pending import Emission, Grant, Pending, Refusal, Replay
from .wants import Wants

T = TypeVar("T")

EncodePublish: TypeAlias = Callable[[bytes, bytes, bool, int | None], bytes]
"""Encodes a PUBLISH from its topic, payload, retain flag and packet id (``None`` for QoS 0)."""

SYSTEM: Final = "emitter/"
"""The channel of the broker's replies, to which clients with a wide key can also publish."""

_MAX_PACKET_IDS: Final = 65535
_RESERVED_PACKET_IDS: Final = 4096
"""The number of packet ids reserved for packets that cannot wait, such as UNSUBSCRIBE."""

_REPLAY_BYTES: Final = 65536
"""The maximum number of bytes that the broker replays to a subscription."""


class Session:
    """
    The packet ids, pending calls and counters of a connection.

    :param wants: the subscriptions and presence feeds that the client needs
    :param send: queues a packet
    :param write: queues an encoded PUBLISH
    :param encode_publish: encodes a PUBLISH
    """

    def __init__(
        self,
        wants: Wants,
        send: Callable[[Packet], None],
        write: Callable[[bytes], None],
        encode_publish: EncodePublish,
    ) -> None:
        self._wants = wants
        self._send = send
        self._write = write
        self._encode_publish = encode_publish
        self._pending: dict[int, Pending[Any]] = {}
        self._pings: deque[Pending[RequestError | None]] = deque()
        self._last_id = 0
        self._when_free: list[Callable[[], None]] = []
        self._publishes_read = 0
        self._refusal: RequestError | None = None
        self._replays: dict[Grant, int] = {}
        """The number of bytes that the broker might still replay to each subscription."""
        self._has_left_feed = False
        self.published = 0
        """The number of QoS 0 publishes queued on this connection."""
        self.answered = 0
        """The number of acknowledgements received."""
        self.nonsense = 0
        """The number of unexpected packets and invalid replies received."""
        self.connection_id: str | None = None

    # Requests

    @property
    def pending(self) -> int:
        """The number of outstanding acknowledgements."""
        return len(self._pending) + len(self._pings)

    @property
    def uncertain(self) -> bool:
        """Whether the broker might not have read everything that was published."""
        published = (one.operation.startswith("publish") for one in self._pending.values())
        return self.published > self._publishes_read or any(published)

    @property
    def full(self) -> bool:
        """Whether only the reserved packet ids are left."""
        return len(self._pending) >= _MAX_PACKET_IDS - _RESERVED_PACKET_IDS

    @property
    def replays(self) -> bool:
        """Whether the broker might be replaying stored messages."""
        return bool(self._replays)

    def call_when_free(self, waker: Callable[[], None]) -> None:
        """Call a function when a packet id becomes free or the connection is lost."""
        self._when_free.append(waker)

    def publish(self, topic: bytes, payload: bytes, retain: bool = False) -> None:
        """Queue a QoS 0 publish."""
        packet = self._encode_publish(topic, payload, retain, None)
        self.published += 1
        self._write(packet)

    def publish_encoded(self, packets: Sequence[bytes]) -> None:
        """Queue encoded QoS 0 publishes that an earlier connection did not send."""
        self.published += len(packets)
        for packet in packets:
            self._write(packet)

    def publish_qos_1(
        self,
        topic: bytes,
        payload: bytes,
        key: str | None,
        channel: str | None,
        retain: bool = False,
    ) -> Pending[None]:
        """
        Queue a QoS 1 publish.

        :param key: the key, for errors; ``None`` for ``publish_with_link()``
        :param channel: the channel, for errors; ``None`` for ``publish_with_link()``
        """
        operation = "publish_with_link" if key is None else "publish"
        pending: Pending[None] = Pending(operation, key, channel, publishes_before=self.published)
        packet_id = self._register(pending)
        try:
            packet = self._encode_publish(topic, payload, retain, packet_id)
        except BaseException:
            self._forget(packet_id)
            raise
        self._write(packet)
        return pending

    def request(
        self, request: Request[T], *, awaited: bool = True, quiet: bool = False
    ) -> Pending[T]:
        """Send a control request."""
        pending: Pending[T] = Pending(
            request.operation,
            request.key,
            request.channel,
            request=request,
            publishes_before=self.published,
            awaited=awaited,
            quiet=quiet,
        )
        topic = request.topic.encode()
        self._send_pending(pending, lambda packet_id: Publish(topic, request.body, packet_id))
        return pending

    def ping(self, *, awaited: bool = True) -> Pending[RequestError | None]:
        """
        Send a PINGREQ.

        :return: a pending packet; its value is the first refusal of a QoS 0 publish since the last
            awaited PINGREQ, or ``None``
        """
        pending: Pending[RequestError | None] = Pending(
            "flush", publishes_before=self.published, awaited=awaited
        )
        self._pings.append(pending)
        self._send(PINGREQ)
        return pending

    def subscribe(
        self, source: KeySource, key: str, filter: str, replay: Replay
    ) -> tuple[Grant, bool]:
        """
        Add a user of a subscription; send SUBSCRIBE if it is new.

        :param source: the key or key function that the user passed
        :param key: the key that is sent to the broker
        :param filter: the channel, preceded by its group if there is one
        :param replay: the stored messages to replay
        :return: the subscription, and whether to read the replay with a history request, because
            other subscribers would receive a replay by the broker
        :raises SubscriptionConflictError: if the broker cannot distinguish it from another
        """
        wants = self._wants
        wants.check(filter)
        shared = wants.overlaps(filter)
        grant = wants.find(source, filter)
        if grant is None:
            grant = Grant(source, key, filter)
            self._send_subscribe(grant, key, Replay(last=0) if shared else replay)
            wants.add(grant)
        grant.use()
        return grant, shared and not replay.is_empty

    def restore(self) -> list[Grant]:
        """
        Send SUBSCRIBE for every subscription, on a new connection.

        Refused subscriptions are kept. The caller subscribes with another key, or removes them.
        """
        grants = self._wants.grants
        for grant in grants:
            self._send_subscribe(grant, grant.key, Replay(last=0))
        return grants

    def subscribe_again(self, grant: Grant, key: str) -> None:
        """Send SUBSCRIBE for a refused subscription, with another key."""
        self._send_subscribe(grant, key, Replay(last=0))
        self._wants.add(grant)

    def unsubscribe_unused(self, grants: Sequence[Grant]) -> Pending[None] | None:
        """
        Unsubscribe the subscriptions that :meth:`Wants.leave` or :meth:`Wants.remove` returned.

        :return: the last UNSUBSCRIBE, or ``None`` if none was sent
        """
        # UNSUBSCRIBE with one accepted key is enough. If none is accepted yet, use every pending
        # key, quietly: the broker refuses UNSUBSCRIBE with the same keys as SUBSCRIBE.
        usable = [grant for grant in grants if not grant.refused]
        granted = [grant for grant in usable if grant.asked.done]
        pending: Pending[None] | None = None
        for grant in granted[:1] or usable:
            quiet = not grant.asked.done
            pending = self.unsubscribe(grant.key, grant.filter, awaited=False, quiet=quiet)
        return pending

    def unsubscribe(
        self, key: str, filter: str, *, awaited: bool = True, quiet: bool = False
    ) -> Pending[None]:
        """Send an UNSUBSCRIBE."""
        pending: Pending[None] = Pending(
            "unsubscribe",
            key,
            filter,
            publishes_before=self.published,
            awaited=awaited,
            quiet=quiet,
        )
        topic = format_topic(key, filter)
        self._send_pending(pending, lambda packet_id: Unsubscribe(packet_id, topic))
        return pending

    def leave_feed(self) -> None:
        """
        Ignore changes in channels without a feed from now on.

        Another task of the broker sends them, so some can follow even the acknowledgement of the
        request that ends the feed.
        """
        self._has_left_feed = True

    def awaited(self) -> list[Pending[Any]]:
        """Return the pending packets whose outcome a caller awaits."""
        asked = (*self._pending.values(), *self._pings)
        return [pending for pending in asked if pending.awaited and not pending.done]

    # Replays

    def replaying(self, channel: str) -> Pending[None] | None:
        """Return a pending SUBSCRIBE whose replay might reach a new subscription to a channel."""
        for grant in self._replays:
            if overlap(channel, grant.channel, self._wants.matcher):
                return grant.asked
        return None

    def in_replay(self, message: EmitterMessage) -> bool:
        """Return whether a message might belong to a replay, and count its bytes."""
        for grant, left in self._replays.items():
            if left > 0 and reaches(grant.channel, message.channel, self._wants.matcher):
                self._replays[grant] = left - len(message.binary) - 1
                return True
        return False

    # Replies

    def receive(self, event: Answer) -> Iterable[Emission]:
        """
        Handle a decoded packet other than an ordinary message.

        :return: the events to emit
        :raises RemoteProtocolError: if the packet violates the protocol
        """
        if isinstance(event, PubAck):
            return self._receive_acknowledgement(event.packet_id, PubAck)
        match event:
            case EmitterMessage():
                return self._receive_control(event)
            case UnsubAck(packet_id):
                return self._receive_acknowledgement(packet_id, UnsubAck)
            case SubAck(packet_id, codes):
                return self._receive_acknowledgement(packet_id, SubAck, codes)
            case PingResp():
                return self._receive_pingresp()
            case Undecodable(size):
                return self._report(f"a message of {size} bytes whose topic is not UTF-8")
            case ConnAck():
                raise RemoteProtocolError("the broker sent a second CONNACK")
            case _:
                raise event

    def lost(self, error: Callable[[], Exception]) -> int:
        """
        Fail all pending calls, because the connection has ended.

        :param error: makes a new exception for each call
        :return: the number of QoS 0 publishes that the broker might not have read
        """
        pending = [*self._pending.values(), *self._pings]
        self._pending.clear()
        self._pings.clear()
        self._replays.clear()
        self._wake_waiters()
        uncertain = self.published - self._publishes_read
        self.published = self._publishes_read = 0
        for one in pending:
            one.fail(error)
        # These are methods of the connection. Break the reference cycle.
        self._send = self._write = _send_nothing
        return uncertain

    # Details

    def _send_subscribe(self, grant: Grant, key: str, replay: Replay) -> None:
        topic = format_topic(key, grant.filter, replay.options)
        pending: Pending[None] = Pending(
            "subscribe", key, grant.filter, publishes_before=self.published, grant=grant
        )
        self._send_pending(pending, lambda packet_id: Subscribe(packet_id, topic))
        grant.ask(key, pending)
        if not replay.is_empty:
            self._replays[grant] = _REPLAY_BYTES

    def _send_pending(self, pending: Pending[Any], make: Callable[[int], Packet]) -> None:
        packet_id = self._register(pending)
        try:
            self._send(make(packet_id))
        except BaseException:
            self._forget(packet_id)
            raise

    def _register(self, pending: Pending[Any]) -> int:
        if len(self._pending) >= _MAX_PACKET_IDS:
            raise RuntimeError(
                f"no packet id is free: the broker has not acknowledged {_MAX_PACKET_IDS} packets"
            )
        packet_id = self._last_id
        while True:
            packet_id = packet_id % _MAX_PACKET_IDS + 1
            if packet_id not in self._pending:
                break
        self._last_id = packet_id
        self._pending[packet_id] = pending
        return packet_id

    def _forget(self, packet_id: int) -> None:
        del self._pending[packet_id]
        if self._when_free:
            self._wake_waiters()

    def _wake_waiters(self) -> None:
        wakers, self._when_free = self._when_free, []
        for waker in wakers:
            waker()

    def _receive_acknowledgement(
        self, packet_id: int, kind: type[Answer], codes: tuple[int, ...] = ()
    ) -> Iterable[Emission]:
        pending = self._pending.get(packet_id)
        if pending is None or kind is not _ACKNOWLEDGED_BY.get(pending.operation, PubAck):
            return self._report(f"{kind.__name__.upper()} for a packet that was not sent")
        self._forget(packet_id)
        self.answered += 1
        if pending.publishes_before > self._publishes_read:
            self._publishes_read = pending.publishes_before
        if pending.done:
            return ()
        refusal = pending.refusal
        if kind is SubAck:
            denied = not codes or codes[0] >= 0x80
            refusal = (
                (refusal or (None, "refused by the broker without a reason")) if denied else None
            )
            # A packet that is acknowledged by SUBACK is a SUBSCRIBE, which has a grant.
            grant = pending.grant
            assert grant is not None
            self._replays.pop(grant, None)
            grant.answer(accepted=not denied)
            if not grant.accepted:
                self.unsubscribe_unused(self._wants.remove(grant))
        if refusal is not None:
            return self._refuse(pending, *refusal)
        if pending.request is None:
            pending.succeed(None)
        else:
            pending.fail(lambda: _missing_reply_error(pending))
        return ()

    def _receive_pingresp(self) -> Iterable[Emission]:
        if not self._pings:
            return self._report("PINGRESP without a PINGREQ")
        ping = self._pings.popleft()
        self._publishes_read = max(self._publishes_read, ping.publishes_before)
        refusal = None
        if ping.awaited:
            refusal, self._refusal = self._refusal, None
        ping.succeed(refusal)
        return ()

    def _receive_control(self, message: EmitterMessage) -> Iterable[Emission]:
        operation = message.channel[len(SYSTEM) :].partition("?")[0].rstrip("/")
        try:
            answer = requests.parse_object(message.binary)
            req = answer.get("req")
            if req is None:
                emissions = self._receive_unsolicited(operation, answer)
            else:
                emissions = self._receive_reply(operation, req, answer)
        except InvalidReplyError as exc:
            return self._receive_unexpected(message, str(exc))
        return (
            self._receive_unexpected(message, "no request is waiting for it")
            if emissions is None
            else emissions
        )

    def _receive_reply(self, operation: str, req: object, answer: Any) -> Iterable[Emission] | None:
        pending = self._pending.get(req) if is_int(req) else None
        if pending is None:
            return None
        request = pending.request
        if request is None:
            if operation != "error":
                return None
            pending.note_refusal(requests.parse_refusal(answer))
            return ()
        if operation != request.operation:
            return None
        if pending.done:
            return ()
        try:
            refusal = requests.parse_refusal(answer)
            value = None if refusal else request.parse(answer)
        except InvalidReplyError as exc:
            pending.note_invalid_reply(str(exc))
            raise
        if refusal:
            return self._refuse(pending, *refusal)
        if isinstance(value, requests.Me):
            self.connection_id = value.id
        pending.succeed(value)
        if value is None or not pending.awaited or not request.emits:
            return ()
        return (Emission(request.operation, value),)

    def _receive_unsolicited(self, operation: str, answer: Any) -> Iterable[Emission] | None:
        if operation == "presence":
            event = requests.parse_presence_event(answer)
            if self._wants.feed_reaches(event.channel):
                return (Emission("presence", event),)
            if self._has_left_feed:
                return ()
        elif operation == "error" and self.published > self._publishes_read:
            refusal = requests.parse_refusal(answer)
            if refusal is not None:
                status, message = refusal
                error = make_request_error(
                    status,
                    message,
                    operation="publish",
                    hint="the publish had qos=0; to identify it, use qos=1 or await flush()",
                )
                self._refusal = self._refusal or error
                refused = Refusal("publish", None, status)
                return (Emission("refused", refused), Emission("error", error))
        return None

    def _receive_unexpected(self, message: EmitterMessage, why: str) -> Iterable[Emission]:
        # A subscription to "+/" also receives messages that clients publish below "emitter/".
        if self._wants.subscription_reaches(message.channel):
            return (Emission("message", message),)
        return self._report(f"a message on {message.channel[:64]!r}: {why}")

    def _report(self, what: str) -> Iterable[Emission]:
        self.nonsense += 1
        if self.nonsense > 1:
            return ()
        error = RemoteProtocolError(
            f"the broker sent {what}; unexpected packets are dropped and counted "
            "(statistics().nonsense)"
        )
        return (Emission("error", error),)

    def _refuse(
        self, pending: Pending[Any], status: int | None, message: str
    ) -> Iterable[Emission]:
        def error() -> RequestError:
            return make_refusal(status, message, pending.operation, pending.key, pending.channel)

        pending.fail(error)
        if pending.quiet:
            return ()
        refused = Emission("refused", Refusal(pending.operation, pending.channel, status))
        return (refused,) if pending.awaited else (refused, Emission("error", error()))


def _send_nothing(packet: object) -> None:
    """Do nothing, because the connection has ended."""


_ACKNOWLEDGED_BY: Final[dict[str, type[Answer]]] = {"subscribe": SubAck, "unsubscribe": UnsubAck}


def _missing_reply_error(pending: Pending[Any]) -> EmitterError:
    if pending.invalid_reply is not None:
        return RemoteProtocolError(
            f"{pending.operation}: the broker sent an invalid reply: {pending.invalid_reply}"
        )
    return RequestError(
        None,
        "acknowledged without a reply: it was too large for the broker to send (64 KiB)",
        operation=pending.operation,
        channel=pending.channel,
    )
