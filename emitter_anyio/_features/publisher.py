"""Publishing."""

from __future__ import annotations

from collections.abc import Awaitable
from threading import get_ident
from typing import Final, Literal, TypeAlias

from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from emitter_anyio._net.options import Options
from emitter_anyio._runtime.requester import DEFAULT, Requester, Timeout, check_timeout
from emitter_anyio._runtime.slot import Slot
from emitter_anyio._runtime.trace import Trace
from emitter_anyio._values.channels import (
    ChannelKey,
    Key,
    KeySource,
    check_channel,
    check_key,
    check_key_source,
    format_topic,
)
from emitter_anyio._values.checks import check_flag, check_optional_int, is_int
from emitter_anyio._values.messages import Payload, encode_payload

TopicOptions: TypeAlias = tuple[tuple[str, int | None], ...]

_CACHED_TOPICS: Final = 1024

_CHECKED_PUBLISHES: Final = 16
"""``publish(qos=0)`` checks for cancellation at least every 16 calls."""
_PUBLISHES_PER_TURN: Final = 64
"""``publish(qos=0)`` yields at least every 64 calls."""

_HEADER_BYTES: Final = 4
"""The maximum number of bytes of a PUBLISH, without topic and payload, in its size limit."""


class Publisher:
    """
    The publisher of messages, with a cache of recent topics.

    :param slot: the current connection
    :param requester: waits for queue space and for replies
    :param options: the client's options
    :param trace: reports each publish
    """

    def __init__(self, slot: Slot, requester: Requester, options: Options, trace: Trace) -> None:
        self._slot = slot
        self._trace = trace
        self._requester = requester
        self._json_encoder = options.json_encoder
        self._max_topic_and_payload_bytes = options.max_message_size - _HEADER_BYTES
        self._topics: dict[tuple[object, ...], bytes] = {}

    def put(
        self,
        key: Key,
        channel: str,
        message: Payload,
        ttl: int | None,
        qos: Literal[0, 1],
        retain: bool,
        echo: bool,
        timeout: Timeout,
    ) -> Awaitable[None] | None:
        """
        Queue a publish immediately, if possible.

        :return: an awaitable that completes the publish, or ``None`` if nothing is left to wait for
        """
        # Only plain types may look up a topic, because a subclass might compare differently.
        if not (
            type(key) is str
            and type(channel) is str
            and (ttl is None or type(ttl) is int)
            and type(qos) is int
            and (retain is False or retain is True)
            and (echo is True or echo is False)
            and timeout is DEFAULT
        ):
            if isinstance(key, ChannelKey):
                return self.put(key.key, channel, message, ttl, qos, retain, echo, timeout)
            retain, echo = check_flag("retain", retain), check_flag("echo", echo)
            ttl, qos = check_optional_int("ttl", ttl), check_qos(qos)
            key, channel = check_key_source(key), check_channel(channel)
            timeout = check_timeout(timeout)
            if not isinstance(key, str):
                payload = encode_payload(message, self._json_encoder)
                return self._put_with_key(key, channel, payload, ttl, qos, retain, echo, timeout)
        # Not with []: a KeyError as context would show the key in the tracebacks of later errors.
        topic = self._topics.get((key, channel, ttl, echo))
        if topic is None:
            topic = self._make_topic(key, channel, ttl, echo)
        payload = message if type(message) is bytes else encode_payload(message, self._json_encoder)
        slot = self._slot
        connection = slot.connection
        if (
            slot.direct_thread == get_ident()
            and connection is not None
            and (writer := connection.writer).size < writer.limit
            and len(topic) + len(payload) <= self._max_topic_and_payload_bytes
        ):
            session = connection.session
            if qos == 0 and session.published % _CHECKED_PUBLISHES:
                session.publish(topic, payload, retain)
                return None
            if qos == 1 and not session.full:
                slot.owner.check()
                sent = session.publish_qos_1(topic, payload, key, channel, retain)
                return self._requester.answer(connection, sent, timeout)
        return self.publish(topic, payload, key, channel, check_qos(qos), retain, timeout)

    async def publish(
        self,
        topic: bytes,
        payload: bytes,
        key: str | None,
        channel: str | None,
        qos: Literal[0, 1],
        retain: bool,
        timeout: Timeout,
    ) -> None:
        """
        Publish, and await the acknowledgement with ``qos=1``.

        :param key: the key, for errors; ``None`` for a publish through an Emitter link
        """
        requester = self._requester
        with self._trace.span("publish", channel=channel, qos=qos, size=len(payload)):
            if qos == 0:
                session = self._slot.session
                if session is not None and session.published % _PUBLISHES_PER_TURN:
                    await checkpoint_if_cancelled()
                else:
                    await checkpoint()
            requester.check_size(topic, payload, qos)
            connection = await requester.space()
            session = connection.session
            if qos == 0:
                session.publish(topic, payload, retain)
            else:
                sent = session.publish_qos_1(topic, payload, key, channel, retain)
                await requester.answer(connection, sent, timeout)

    async def _put_with_key(
        self,
        source: KeySource,
        channel: str,
        payload: bytes,
        ttl: int | None,
        qos: Literal[0, 1],
        retain: bool,
        echo: bool,
        timeout: Timeout,
    ) -> None:
        async def publish(key: str) -> None:
            waiting = self.put(key, channel, payload, ttl, qos, retain, echo, timeout)
            if waiting is not None:
                await waiting

        await self._requester.with_key(source, publish)

    def _make_topic(self, key: str, channel: str, ttl: int | None, echo: bool) -> bytes:
        options = topic_options(ttl, echo)
        topic = format_topic(check_key(key), check_channel(channel), options).encode()
        if len(self._topics) >= _CACHED_TOPICS:
            self._topics.clear()
        self._topics[key, channel, ttl, echo] = topic
        return topic


def check_qos(qos: int) -> Literal[0, 1]:
    """
    Check a ``qos`` argument.

    :raises TypeError: if it is not an int
    :raises ValueError: if it is neither 0 nor 1
    """
    if not is_int(qos):
        raise TypeError(f"qos must be an int, not {type(qos).__name__}")
    if qos not in (0, 1):
        raise ValueError(f"qos must be 0 or 1, not {qos!r}: Emitter handles QoS 2 like QoS 1")
    return 1 if qos else 0


def topic_options(ttl: int | None, echo: bool) -> TopicOptions:
    """Return the options of a PUBLISH topic."""
    return ("ttl", check_optional_int("ttl", ttl) or None), (
        "me",
        None if check_flag("echo", echo) else 0,
    )
