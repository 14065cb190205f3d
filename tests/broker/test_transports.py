"""TCP, TLS and WebSocket on one port, and Paho as a client."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal

import anyio
import pytest
from anyio import to_thread
from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream
from paho.mqtt.client import Client as Paho
from paho.mqtt.client import MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion
from wsproto.events import CloseConnection, Ping, Pong

from emitter_anyio.testing import Broker, _connection
from emitter_anyio.testing._packets import (
    ConnAck,
    Connect,
    Disconnect,
    PingReq,
    PingResp,
    Publish,
    SubAck,
    Subscribe,
)
from tests.broker.player import PacketConnection
from tests.broker.websocket import WebSocketStream
from tests.support import tls
from tests.support.logs import logged

TIMEOUT_SECONDS = 240
"""The time that a thread waits for events. It is less than pytest's timeout."""


@pytest.fixture(params=["plain", "TLS"])
async def broker(anyio_backend: object, request: pytest.FixtureRequest) -> AsyncIterator[Broker]:
    context = tls.server_context() if request.param == "TLS" else None
    async with Broker(ssl_context=context) as broker:
        yield broker


@pytest.fixture
async def streams(anyio_backend: object) -> AsyncIterator[list[ByteStream]]:
    """Streams that are closed at the end of the test."""
    streams: list[ByteStream] = []
    yield streams
    for stream in streams:
        await anyio.aclose_forcefully(stream)


async def open_stream(broker: Broker) -> ByteStream:
    stream = await anyio.connect_tcp(broker.host, broker.port)
    if broker.url.startswith("mqtts:"):
        return await TLSStream.wrap(
            stream,
            hostname=broker.host,
            ssl_context=tls.client_context(),
            standard_compatible=False,
        )
    return stream


async def read_to_end(stream: ByteStream) -> bytes:
    received = b""
    while True:
        try:
            received += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return received


class TestOnePort:
    async def test_transports_share_a_port(self, broker: Broker, streams: list[ByteStream]) -> None:
        streams += [
            await open_stream(broker),
            await WebSocketStream.connect(await open_stream(broker), "/any"),
        ]
        connections = [PacketConnection(stream) for stream in streams]
        key = broker.keygen("a/")
        for connection in connections:
            asked = Subscribe(1, ((f"{key}/a/", 0),))
            assert await connection.ask(Connect(), asked) == [ConnAck(), SubAck(1, (0,))]
        for connection in connections:
            await connection.send(Publish(f"{key}/a/", bytes(60000)))
            for receiver in connections:
                assert await receiver.receive() == Publish("a/", bytes(60000))

    async def test_health(self, broker: Broker, streams: list[ByteStream]) -> None:
        streams.append(await open_stream(broker))
        await streams[0].send(b"GET /health HTTP/1.1\r\n")
        await streams[0].send(b"Host: localhost\r\n\r\n")
        assert (await read_to_end(streams[0])).startswith(b"HTTP/1.1 200 OK\r\n")

    @pytest.mark.parametrize("garbage", [b"GET\r\n\r\n", b"\0\0", b"\xff\xff\xff\xff\xff"])
    async def test_garbage_closes_only_its_connection(
        self, broker: Broker, streams: list[ByteStream], garbage: bytes
    ) -> None:
        streams += [await open_stream(broker), await open_stream(broker)]
        connection = PacketConnection(streams[0])
        assert await connection.ask(Connect()) == [ConnAck()]
        await streams[1].send(garbage)
        await read_to_end(streams[1])
        assert await connection.ask() == []
        assert not connection.closed

    async def test_connection_without_bytes_can_be_dropped(
        self, broker: Broker, streams: list[ByteStream]
    ) -> None:
        streams += [await anyio.connect_tcp(broker.host, broker.port), await open_stream(broker)]
        await streams[1].send(b"GET")
        connection = PacketConnection(await open_stream(broker))
        streams.append(connection.stream)
        # Because this connection is the newest, the broker has accepted the others, too.
        assert await connection.ask(Connect()) == [ConnAck()]
        await broker.drop()
        for stream in streams:
            assert await read_to_end(stream) == b""


class TestWebSocket:
    @pytest.fixture
    async def websocket(self, broker: Broker, streams: list[ByteStream]) -> WebSocketStream:
        websocket = await WebSocketStream.connect(await open_stream(broker))
        streams.append(websocket)
        return websocket

    async def test_each_packet_has_its_own_frame(self, websocket: WebSocketStream) -> None:
        assert websocket.subprotocol == "mqtt"
        await PacketConnection(websocket).ask(Connect(), PingReq())
        assert websocket.frames == [ConnAck().encode(), PingResp().encode(), PingResp().encode()]

    async def test_websocket_ping_gets_a_pong(self, websocket: WebSocketStream) -> None:
        await websocket.send_event(Ping(b"hey"))
        await PacketConnection(websocket).ask(Connect())
        assert websocket.received == [Pong(b"hey")]

    async def test_websocket_close_gets_a_close_and_ends_the_connection(
        self, broker: Broker, websocket: WebSocketStream
    ) -> None:
        assert await PacketConnection(websocket).ask(Connect()) == [ConnAck()]
        [client] = broker.clients
        await websocket.send_event(CloseConnection(1000, "enough"))
        assert await read_to_end(websocket) == b""
        assert websocket.received == [CloseConnection(1000, "enough")]
        await client.wait_closed()

    async def test_disconnect_ends_the_connection_without_a_websocket_close(
        self, websocket: WebSocketStream
    ) -> None:
        connection = PacketConnection(websocket)
        await connection.send(Connect(), PingReq(), Disconnect())
        assert await connection.read_to_end() == [ConnAck(), PingResp()]
        assert websocket.received == []


class TestTLS:
    @pytest.fixture
    async def broker(self, anyio_backend: object) -> AsyncIterator[Broker]:
        async with Broker(ssl_context=tls.server_context()) as broker:
            yield broker

    async def test_url_has_the_scheme_mqtts(self, broker: Broker) -> None:
        assert broker.url == f"mqtts://127.0.0.1:{broker.port}"

    @pytest.mark.parametrize("said", [Connect().encode(), b"GET /health HTTP/1.1\r\n\r\n"])
    async def test_client_without_tls_is_disconnected(
        self,
        broker: Broker,
        streams: list[ByteStream],
        said: bytes,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        streams.append(await anyio.connect_tcp(broker.host, broker.port))
        await streams[0].send(said)
        # The broker sends nothing, or a TLS alert.
        assert (await read_to_end(streams[0]))[:1] in (b"", b"\x15")
        await broker.drop()
        assert logged(caplog, logging.WARNING) == []

    async def test_silent_client_is_disconnected(
        self, broker: Broker, streams: list[ByteStream], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_connection, "IDLE_TIMEOUT_SECONDS", 0)
        streams.append(await anyio.connect_tcp(broker.host, broker.port))
        assert await read_to_end(streams[0]) == b""

    async def test_garbage_after_the_handshake(
        self, broker: Broker, streams: list[ByteStream], caplog: pytest.LogCaptureFixture
    ) -> None:
        streams.append(await open_stream(broker))
        connection = PacketConnection(streams[0])
        assert await connection.ask(Connect()) == [ConnAck()]
        [client] = broker.clients
        assert isinstance(connection.stream, TLSStream)
        await connection.stream.transport_stream.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        await client.wait_closed()
        assert logged(caplog, logging.WARNING) == []


class TestPaho:
    """Paho's client, in a thread."""

    @pytest.mark.parametrize("transport", ["tcp", "websockets"])
    async def test_paho_publishes_and_receives(
        self, broker: Broker, transport: Literal["tcp", "websockets"]
    ) -> None:
        topic = f"{broker.keygen('a/')}/a/"
        context = tls.client_context() if broker.url.startswith("mqtts:") else None
        received = await to_thread.run_sync(
            partial(_publish_and_receive, broker.host, broker.port, transport, context, topic)
        )
        assert received == [("a/", bytes(size)) for size in (0, 1, 100, 1000, 60000)]


def _publish_and_receive(
    host: str,
    port: int,
    transport: Literal["tcp", "websockets"],
    context: ssl.SSLContext | None,
    topic: str,
) -> list[tuple[str, bytes]]:
    client = Paho(CallbackAPIVersion.VERSION2, transport=transport)
    if context is not None:
        client.tls_set_context(context)
    events: SimpleQueue[Any] = SimpleQueue()
    client.on_subscribe = lambda *_: events.put("subscribed")

    # No callback refers to the client, which closes its last sockets when it is deleted.
    def on_connect(client: Paho, *_: object) -> None:
        client.subscribe(topic)

    def on_message(client: Paho, userdata: object, message: MQTTMessage) -> None:
        events.put((message.topic, message.payload))

    client.on_connect = on_connect
    client.on_message = on_message
    client.connect(host, port)
    client.loop_start()
    try:
        assert events.get(timeout=TIMEOUT_SECONDS) == "subscribed"
        for qos, size in enumerate((0, 1, 100, 1000, 60000)):
            client.publish(topic, bytes(size), qos % 3)
        return [events.get(timeout=TIMEOUT_SECONDS) for _ in range(5)]
    finally:
        client.disconnect()
        client.loop_stop()
