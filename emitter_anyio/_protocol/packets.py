"""The types between session and codec: outgoing packets and incoming events.

An incoming PUBLISH is an :class:`~emitter_anyio.EmitterMessage`. Consecutive messages form one
event, because they make up most traffic.
"""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

from emitter_anyio._values.batches import MessageBatch, make_batch
from emitter_anyio._values.errors import RemoteProtocolError
from emitter_anyio._values.messages import EmitterMessage


def _redact_key(topic: str) -> str:
    return repr(f"…/{topic.partition('/')[2]}")


class Connect(NamedTuple):
    """A CONNECT packet. Its ``repr`` hides the password."""

    client_id: str = ""
    username: str | None = None
    password: str | None = None
    keepalive: int = 30
    will: Publish | None = None

    def __repr__(self) -> str:
        return f"Connect(username={self.username!r}, password=…, will={self.will})"


class Publish(NamedTuple):
    """A PUBLISH packet: QoS 1 if it has a packet id, else QoS 0."""

    topic: bytes
    payload: bytes
    packet_id: int | None = None
    retain: bool = False

    def __repr__(self) -> str:
        # The payload of a request contains keys.
        return (
            f"Publish(topic={_redact_key(self.topic.decode(errors='replace'))}, "
            f"{len(self.payload)} bytes, packet_id={self.packet_id}, retain={self.retain})"
        )


class Subscribe(NamedTuple):
    """A SUBSCRIBE packet with one filter, at QoS 0, the only QoS at which Emitter delivers."""

    packet_id: int
    topic: str

    def __repr__(self) -> str:
        return f"Subscribe(packet_id={self.packet_id}, topic={_redact_key(self.topic)})"


class Unsubscribe(NamedTuple):
    """An UNSUBSCRIBE packet with one filter."""

    packet_id: int
    topic: str

    def __repr__(self) -> str:
        return f"Unsubscribe(packet_id={self.packet_id}, topic={_redact_key(self.topic)})"


class PingReq(NamedTuple):
    """A PINGREQ packet."""


class Disconnect(NamedTuple):
    """A DISCONNECT packet."""


class ConnAck(NamedTuple):
    """A CONNACK packet; the code 0 means accepted."""

    code: int


class PubAck(NamedTuple):
    """A PUBACK packet, which also follows a refusal."""

    packet_id: int


class SubAck(NamedTuple):
    """A SUBACK packet; a code of 0 to 2 means accepted, 128 refused."""

    packet_id: int
    codes: tuple[int, ...]


class UnsubAck(NamedTuple):
    """An UNSUBACK packet, which also follows a refusal."""

    packet_id: int


class PingResp(NamedTuple):
    """A PINGRESP packet: the broker has handled everything before the PINGREQ."""


class Undecodable(NamedTuple):
    """A PUBLISH packet whose topic is not UTF-8."""

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
"""An event other than a batch. The session handles all of them except ordinary messages."""

Event: TypeAlias = MessageBatch | Answer
"""An event from the codec; consecutive messages are one batch."""


def append_event(events: list[Event], event: Event) -> None:
    """Append an event; consecutive messages become one batch."""
    # In a batch, a message for a full buffer does not delay later messages to other consumers.
    last = events[-1] if events else None
    if type(event) is EmitterMessage:
        if type(last) is EmitterMessage:
            last = events[-1] = make_batch([last])
        if type(last) is MessageBatch:
            last.append(event)
            return
    events.append(event)
