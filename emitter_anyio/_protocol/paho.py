"""Paho as the protocol engine: the only file that imports it.

Paho reads and writes a socket in memory, by ``loop_read()`` and ``loop_write()``, which never wait
here. Each connection has a fresh Paho client, because Paho sends again on its next connection what
the last one left unacknowledged, and Emitter would execute such a request twice.
"""

from __future__ import annotations

from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from emitter_anyio._protocol.packets import Connect, Event, PubAck, SubAck, Undecodable, UnsubAck
from emitter_anyio._values.errors import RemoteProtocolError
from emitter_anyio._values.messages import EmitterMessage


class _MemorySocket:
    """The socket that Paho reads and writes."""

    def __init__(self) -> None:
        self._inbound = bytearray()
        self._outbound = bytearray()

    def put(self, data: bytes) -> None:
        """Have Paho read these bytes."""
        self._inbound += data

    def take_written(self) -> bytes:
        """Return and remove what Paho has written."""
        data = bytes(self._outbound)
        self._outbound.clear()
        return data

    def take_unread(self) -> bytes:
        """Return and remove what Paho has not read."""
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

    :param connect: what CONNECT states
    :param socket: its socket
    :param reported: gets what Paho reports of the packets that it reads
    """

    def __init__(self, connect: Connect, socket: _MemorySocket, reported: list[Event]) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            connect.client_id,
            userdata=reported,
            protocol=MQTTProtocolVersion.MQTTv311,
            # Paho would answer some refusals with a blocking reconnect() inside loop_read().
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
        # The callbacks only append to a list, because Paho handles a packet again if one raises.
        self.on_subscribe = _report_suback
        self.on_unsubscribe = _report_unsuback
        self.on_message = _report_message
        self.on_publish = _report_puback

    def use_packet_id(self, packet_id: int) -> None:
        """Give the next packet this id, because the session allots the ids."""
        self._packet_id = packet_id

    def _create_socket(self) -> Any:
        return self._memory

    def _mid_generate(self) -> int:
        # Paho's own counter would run into ids that are pending.
        return self._packet_id

    @staticmethod
    def _filter_wildcard_len_check(sub: bytes) -> MQTTErrorCode:
        # Paho's check rejects "#/" and "#?last=5", which Emitter accepts.
        return MQTTErrorCode.MQTT_ERR_SUCCESS


class PahoEngine:
    """
    One connection's Paho client: calls and whole packets go in, bytes and events come out.

    :param connect: what CONNECT states
    """

    def __init__(self, connect: Connect) -> None:
        self._keepalive = connect.keepalive
        self._socket = _MemorySocket()
        self._reported: list[Event] = []
        # Nothing leads from Paho back to the engine, so that neither waits for the garbage
        # collector.
        self._client = _PahoClient(connect, self._socket, self._reported)

    def connect(self) -> bytes:
        """Encode the CONNECT that begins the connection."""
        self._client.connect("emitter", keepalive=self._keepalive)
        return self.take_written()

    def subscribe(self, packet_id: int, topic: str) -> bytes:
        """Encode a SUBSCRIBE at QoS 0."""
        self._client.use_packet_id(packet_id)
        self._client.subscribe(topic)
        return self.take_written()

    def unsubscribe(self, packet_id: int, topic: str) -> bytes:
        """Encode an UNSUBSCRIBE."""
        self._client.use_packet_id(packet_id)
        self._client.unsubscribe(topic)
        return self.take_written()

    def publish(
        self, topic: bytes, payload: bytes, retain: bool = False, packet_id: int | None = None
    ) -> bytes:
        """Encode a PUBLISH of QoS 0 or, with a packet id, of QoS 1."""
        self._client.use_packet_id(packet_id or 0)
        qos = 0 if packet_id is None else 1
        self._client.publish(topic.decode(), payload, qos, retain)
        return self.take_written()

    def disconnect(self) -> bytes:
        """Encode a DISCONNECT, after which Paho writes nothing and reports nothing."""
        self._client.disconnect()
        return self.take_written()

    def receive(self, packet: bytes) -> list[Event]:
        """
        Pass one whole packet to Paho; :meth:`take_written` returns what it answers.

        :return: what Paho reports of it; nothing after DISCONNECT
        :raises RemoteProtocolError: if Paho finds the packet malformed
        """
        self._socket.put(packet)
        try:
            # One call reads one packet, or more if Paho awaits acknowledgements; there is only one.
            code = self._client.loop_read()
        except Exception as exc:
            # Paho up to 2.1 raises struct.error and others for some malformed packets.
            raise _malformed(packet) from exc
        unread = self._socket.take_unread()
        if code == MQTTErrorCode.MQTT_ERR_NO_CONN:
            # Paho has closed its socket after DISCONNECT.
            return []
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS or unread:
            raise _malformed(packet)
        reported = self._reported.copy()
        self._reported.clear()
        return reported

    def take_written(self) -> bytes:
        """Return what Paho has written, such as the PUBACK of a message that it has received."""
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
    # Paho reports each PUBLISH of QoS 0 as soon as it is written; these have packet id 0.
    if mid:
        reported.append(PubAck(mid))


def _report_message(client: object, reported: list[Event], message: paho.MQTTMessage) -> None:
    payload = bytes(message.payload)
    try:
        reported.append(EmitterMessage(message.topic, payload))
    except UnicodeDecodeError:
        reported.append(Undecodable(len(payload)))
