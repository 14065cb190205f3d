"""Publishing in order without waiting for each acknowledgement, which an outbox needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final
from weakref import WeakKeyDictionary

from emitter_anyio._net.connection import Connection
from emitter_anyio._net.options import Options
from emitter_anyio._protocol.pending import Pending
from emitter_anyio._runtime.events import Events
from emitter_anyio._runtime.holds import Holds
from emitter_anyio._runtime.key_ring import KeyRing
from emitter_anyio._runtime.requester import DEFAULT, Requester
from emitter_anyio._runtime.slot import Slot
from emitter_anyio._runtime.trace import Trace
from emitter_anyio._values.channels import KeySource, format_topic
from emitter_anyio._values.errors import ConnectionLostError
from emitter_anyio._values.messages import Payload

from .publisher import topic_options


class Sent:
    """
    A QoS 1 publish that is queued, and that the broker has not acknowledged yet.

    :param connection: the connection on which it is queued
    :param pending: the packet
    :param requester: awaits the acknowledgement
    :param trace: reports the publish
    :param size: the size of the payload in bytes
    """

    def __init__(
        self,
        connection: Connection,
        pending: Pending[None],
        requester: Requester,
        trace: Trace,
        size: int,
    ) -> None:
        self._connection = connection
        self._pending = pending
        self._requester = requester
        self._trace = trace
        self._size = size

    @property
    def done(self) -> bool:
        """Whether the outcome is known, so that :meth:`accepted` does not wait."""
        return self._pending.done

    async def accepted(self) -> None:
        """
        Wait until the broker has accepted the message. This is not a checkpoint.

        :raises RequestError: if the broker refused the message
        :raises ConnectionLostError: if the connection was lost before
        :raises RequestTimeoutError: if the broker did not reply within ``request_timeout``
        """
        pending = self._pending
        with self._trace.span("publish", channel=pending.channel, qos=1, size=self._size):
            if pending.done:
                pending.result()
            else:
                await self._requester.answer(self._connection, pending, DEFAULT)


class Pipeline:
    """
    Queues QoS 1 publishes in the order of the calls, and returns before they are acknowledged.

    ``Emitter.publish(qos=1)`` returns when the broker has accepted the message. Many tasks that
    call it would publish in any order, because Trio runs tasks in any order.

    :param slot: the state of the client
    :param requester: waits for queue space and for replies
    :param keys: the keys that key functions have returned
    :param events: reports errors
    :param holds: delays disconnecting
    :param options: the options of the client
    :param trace: reports each publish
    """

    def __init__(
        self,
        slot: Slot,
        requester: Requester,
        keys: KeyRing,
        events: Events,
        holds: Holds,
        options: Options,
        trace: Trace,
    ) -> None:
        self._slot = slot
        self._requester = requester
        self._keys = keys
        self._trace = trace
        self.owner = slot.owner
        self.report: Callable[[Exception], None] = events.report
        """Passes an error that no call can raise to ``on("error")``, or logs it."""
        self.disconnect_timeout: float = options.disconnect_timeout
        self.encode: Callable[[Payload], bytes] = requester.encode
        self.hold: Callable[..., None] = holds.set

    @property
    def connection(self) -> Connection | None:
        """The connection, if it can be used for publishing now."""
        connection = self._slot.connection
        return connection if self._slot.usable(connection) else None

    @property
    def leaving(self) -> bool:
        """Whether the client is disconnecting, or has disconnected."""
        return self._slot.leaving

    async def change(self) -> None:
        """Wait until the state of the client or its connection changes."""
        await self._slot.change()

    def check(self, key: str, channel: str, payload: bytes, ttl: int | None, echo: bool) -> None:
        """
        Check the size of a message.

        :raises InvalidChannelError: if the topic is longer than MQTT allows
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``
        """
        self._requester.check_size(_topic(key, channel, ttl, echo), payload, 1)

    def known_key(self, source: KeySource) -> str | None:
        """Return the key for a ``key`` argument, or ``None`` if it is not known yet."""
        return self._keys.known(source)

    async def key_of(self, source: KeySource, refused: str | None = None) -> str:
        """Return the key for a ``key`` argument; see :meth:`Requester.key_of`."""
        return await self._requester.key_of(source, refused)

    async def send(
        self,
        connection: Connection,
        key: str,
        channel: str,
        payload: bytes,
        ttl: int | None,
        retain: bool,
        echo: bool,
    ) -> Sent:
        """
        Queue a publish when there is space.

        :param connection: the connection on which all publishes before it were queued
        :raises MessageTooLargeError: if the packet exceeds ``max_message_size``
        :raises ConnectionLostError: if another connection has replaced it; nothing was queued
        :raises ClosedError: if the client is closed; nothing was queued
        """
        topic = _topic(key, channel, ttl, echo)
        self._requester.check_size(topic, payload, 1)
        if await self._requester.space() is not connection:
            raise ConnectionLostError("the connection was replaced before the message was queued")
        pending = connection.session.publish_qos_1(topic, payload, key, channel, retain)
        return Sent(connection, pending, self._requester, self._trace, len(payload))


def _topic(key: str, channel: str, ttl: int | None, echo: bool) -> bytes:
    return format_topic(key, channel, topic_options(ttl, echo)).encode()


# A public attribute of the client would make all types of a connection part of the public API.
_PIPELINES: Final[WeakKeyDictionary[object, Pipeline]] = WeakKeyDictionary()


def set_pipeline(client: object, pipeline: Pipeline) -> None:
    """Set the pipeline of a client, which :func:`pipeline_of` returns."""
    _PIPELINES[client] = pipeline


def pipeline_of(client: object) -> Pipeline:
    """Return the pipeline of a client."""
    return _PIPELINES[client]
