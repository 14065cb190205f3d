"""The protocol engine, and the only module that imports Paho.

Paho reads and writes an in-memory socket with ``loop_read()`` and ``loop_write()``, which therefore
never block. Each connection has a new Paho client, because Paho resends unacknowledged packets on
its next connection, and Emitter would execute a resent request twice.
"""

from __future__ import annotations

from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from emitter_anyio._protocol.packets import Connect, Event, PubAck, SubAck, Undecodable, UnsubAck
from emitter_anyio._values.errors import RemoteProtocolError
from emitter_anyio._values.messages import EmitterMessage


class _MemorySocket:
    """The in-memory socket that Paho reads and writes."""

    def __init__(self) -> None:
        self._inbound = bytearray()
        self._outbound = bytearray()

    def put(self, data: bytes) -> None:
        """Add bytes for Paho to read."""
        self._inbound += data

    def take_written(self) -> bytes:
        """Return and remove the bytes that Paho has written."""
        data = bytes(self._outbound)
        self._outbound.clear()
        return data

    def take_unread(self) -> bytes:
        """Return and remove the bytes that Paho has not read."""
        data = bytes(self._inbound)
        self._inbound.clear()
        return data

    def recv(self, size: int) -> bytes:
        if not self._inbound:
            raise BlockingIOError
        data = bytes(self._inbound[:size])
        del self._inbound[:size]
        return data

    def send(self, data: bytes | bytearray) -> int:
        self._outbound += data
        return len(data)

    def setblocking(self, flag: bool) -> None:
        pass

    def close(self) -> None:
        pass


class _PahoClient(paho.Client):
    """
    Paho's client with three private hooks: its socket, its packet ids and its filter check.

    :param connect: the contents of CONNECT
    :param socket: the in-memory socket
    :param reported: the list to which its callbacks append events
    """

    def __init__(self, connect: Connect, socket: _MemorySocket, reported: list[Event]) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            connect.client_id,
            userdata=reported,
            protocol=MQTTProtocolVersion.MQTTv311,
            # Otherwise, loop_read() would call the blocking reconnect() after some refusals.
            reconnect_on_failure=False,
        )
        self._packet_id = 0
        self._memory = socket
        # The session limits the number of unacknowledged messages.
        self.max_inflight_messages_set(0)
        if connect.username is not None:
            self.username_pw_set(connect.username, connect.password)
        if (will := connect.will) is not None:
            self.will_set(will.topic.decode(), will.payload, retain=will.retain)
        # The callbacks must not raise, because Paho would handle the packet again.
        self.on_subscribe = _report_suback
        self.on_unsubscribe = _report_unsuback
        self.on_message = _report_message
        self.on_publish = _report_puback

    def use_packet_id(self, packet_id: int) -> None:
        """Set the id of the next packet, because the session allocates the ids."""
        self._packet_id = packet_id

    def _create_socket(self) -> Any:
        return self._memory

    def _mid_generate(self) -> int:
        # Paho's own counter might return ids that are still pending.
        return self._packet_id

    @staticmethod
    def _filter_wildcard_len_check(sub: bytes) -> MQTTErrorCode:
        # Paho's check rejects "#/" and "#?last=5", which Emitter accepts.
        return MQTTErrorCode.MQTT_ERR_SUCCESS


class PahoEngine:
    """
    The Paho client of a connection: encodes packets, and decodes complete packets to events.

    :param connect: the contents of CONNECT
    """

    def __init__(self, connect: Connect) -> None:
        self._keepalive = connect.keepalive
        self._socket = _MemorySocket()
        self._reported: list[Event] = []
        # The client has no reference to the engine, because a reference cycle would delay freeing
        # both until a garbage collection.
        self._client = _PahoClient(connect, self._socket, self._reported)

    def connect(self) -> bytes:
        """Encode CONNECT."""
        self._client.connect("emitter", keepalive=self._keepalive)
        return self.take_written()

    def subscribe(self, packet_id: int, topic: str) -> bytes:
        """Encode SUBSCRIBE at QoS 0."""
        self._client.use_packet_id(packet_id)
        self._client.subscribe(topic)
        return self.take_written()

    def unsubscribe(self, packet_id: int, topic: str) -> bytes:
        """Encode UNSUBSCRIBE."""
        self._client.use_packet_id(packet_id)
        self._client.unsubscribe(topic)
        return self.take_written()

    def publish(
        self, topic: bytes, payload: bytes, retain: bool = False, packet_id: int | None = None
    ) -> bytes:
        """Encode a QoS 0 PUBLISH or, with a packet id, a QoS 1 PUBLISH."""
        self._client.use_packet_id(packet_id or 0)
        qos = 0 if packet_id is None else 1
        self._client.publish(topic.decode(), payload, qos, retain)
        return self.take_written()

    def disconnect(self) -> bytes:
        """Encode DISCONNECT, after which Paho writes and reports nothing."""
        self._client.disconnect()
        return self.take_written()

    def receive(self, packet: bytes) -> list[Event]:
        """
        Pass a complete packet to Paho. :meth:`take_written` returns its answer.

        :return: the events that Paho reports; none after DISCONNECT
        :raises RemoteProtocolError: if the packet is malformed
        """
        self._socket.put(packet)
        try:
            # One call reads at least one packet, and there is only one.
            code = self._client.loop_read()
        except Exception as exc:
            # Paho up to 2.1 raises struct.error and other errors for some malformed packets.
            raise _malformed(packet) from exc
        unread = self._socket.take_unread()
        if code == MQTTErrorCode.MQTT_ERR_NO_CONN:
            # After DISCONNECT, Paho has closed its socket.
            return []
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS or unread:
            raise _malformed(packet)
        reported = self._reported.copy()
        self._reported.clear()
        return reported

    def take_written(self) -> bytes:
        """Return the bytes that Paho has written, such as the PUBACK for a received message."""
        self._client.loop_write()
        return self._socket.take_written()


def _malformed(packet: bytes) -> RemoteProtocolError:
    return RemoteProtocolError(f"the peer sent a malformed packet of type {packet[0] >> 4}")


def _report_suback(
    client: object, reported: list[Event], mid: int, codes: list[Any], _: object
) -> None:
    reported.append(SubAck(mid, tuple(code.value for code in codes)))


def _report_unsuback(
    client: object, reported: list[Event], mid: int, codes: object, _: object
) -> None:
    reported.append(UnsubAck(mid))


def _report_puback(
    client: object, reported: list[Event], mid: int, code: object, _: object
) -> None:
    # Paho also reports written QoS 0 publishes, with packet id 0.
    if mid:
        reported.append(PubAck(mid))


def _report_message(client: object, reported: list[Event], message: paho.MQTTMessage) -> None:
    payload = bytes(message.payload)
    try:
        reported.append(EmitterMessage(message.topic, payload))
    except UnicodeDecodeError:
        reported.append(Undecodable(len(payload)))
