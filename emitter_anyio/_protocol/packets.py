"""The vocabulary between session and codec: packets that leave, and events that arrive.

A ``PUBLISH`` that arrives is an :class:`~emitter_anyio.EmitterMessage` and nothing around it. Those
that come in a row are one event, since they are nearly all of the traffic.
"""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

from emitter_anyio._values.batches import MessageBatch, make_batch
from emitter_anyio._values.errors import RemoteProtocolError
from emitter_anyio._values.messages import EmitterMessage


def _redact_key(topic: str) -> str:
    return repr(f"…/{topic.partition('/')[2]}")


class Connect(NamedTuple):
    """What the ``CONNECT`` of a connection states; its repr hides the password."""

    client_id: str = ""
    username: str | None = None
    password: str | None = None
    keepalive: int = 30
    will: Publish | None = None

    def __repr__(self) -> str:
        return f"Connect(username={self.username!r}, password=…, will={self.will})"


class Publish(NamedTuple):
    """A ``PUBLISH``; a packet id makes it one of QoS 1."""

    topic: bytes
    payload: bytes
    packet_id: int | None = None
    retain: bool = False

    def __repr__(self) -> str:
        # A request's payload carries keys, too.
        return (
            f"Publish(topic={_redact_key(self.topic.decode(errors='replace'))}, "
            f"{len(self.payload)} bytes, packet_id={self.packet_id}, retain={self.retain})"
        )


class Subscribe(NamedTuple):
    """A ``SUBSCRIBE`` to one filter, at QoS 0, the only one at which Emitter delivers."""

    packet_id: int
    topic: str

    def __repr__(self) -> str:
        return f"Subscribe(packet_id={self.packet_id}, topic={_redact_key(self.topic)})"


class Unsubscribe(NamedTuple):
    """An ``UNSUBSCRIBE`` from one filter."""

    packet_id: int
    topic: str

    def __repr__(self) -> str:
        return f"Unsubscribe(packet_id={self.packet_id}, topic={_redact_key(self.topic)})"


class PingReq(NamedTuple):
    """A ``PINGREQ``."""


class Disconnect(NamedTuple):
    """A ``DISCONNECT``."""


class ConnAck(NamedTuple):
    """The broker's answer to CONNECT; a code of 0 is yes."""

    code: int


class PubAck(NamedTuple):
    """The broker has taken a ``PUBLISH``, or refused it before."""

    packet_id: int


class SubAck(NamedTuple):
    """The broker has taken (0 … 2) or refused (128) each filter of a ``SUBSCRIBE``."""

    packet_id: int
    codes: tuple[int, ...]


class UnsubAck(NamedTuple):
    """The broker has taken an ``UNSUBSCRIBE``, or refused it before."""

    packet_id: int


class PingResp(NamedTuple):
    """The broker has worked off all that came before the ``PINGREQ``."""


class Undecodable(NamedTuple):
    """A ``PUBLISH`` whose topic is no UTF-8."""

    size: int


PINGREQ: Final = PingReq()

Packet: TypeAlias = Publish | Subscribe | Unsubscribe | PingReq | Disconnect
Answer: TypeAlias = (
    EmitterMessage
    | ConnAck
    | PubAck
    | SubAck
    | UnsubAck
    | PingResp
    | Undecodable
    | RemoteProtocolError
)
"""What is taken in one by one; the session has those messages in which the broker itself speaks."""

Event: TypeAlias = MessageBatch | Answer
"""What the codec gives: messages in a row together."""


def append_event(events: list[Event], event: Event) -> None:
    """Append an event; messages in a row become one event."""
    # A message for which there is no space then keeps none after it from another consumer.
    last = events[-1] if events else None
    if type(event) is EmitterMessage:
        if type(last) is EmitterMessage:
            last = events[-1] = make_batch([last])
        if type(last) is MessageBatch:
            last.append(event)
            return
    events.append(event)
