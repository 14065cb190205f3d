"""The proxy that simulates network failures."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Callable

import anyio
import pytest
from anyio import BrokenResourceError, EndOfStream
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSStream

from emitter_anyio import ConnectionLostError, connect
from emitter_anyio.testing import Broker, Direction, FaultProxy, _sockets
from emitter_anyio.testing._packets import (
    ConnAck,
    Connect,
    Packet,
    PingReq,
    PubAck,
    Publish,
    Subscribe,
)
from emitter_anyio.testing._sockets import SocketStream
from tests.broker.player import MemoryStream, PacketConnection
from tests.broker.websocket import WebSocketStream
from tests.support import tls
from tests.support.descriptors import no_free_descriptors
from tests.support.logs import awaiting_log

DIRECTIONS: list[Direction] = ["to_broker", "to_client"]


@pytest.fixture
async def streams(anyio_backend: object) -> AsyncIterator[list[ByteStream]]:
    """Streams that are closed at the end of the test."""
    streams: list[ByteStream] = []
    yield streams
    for stream in streams:
        await anyio.aclose_forcefully(stream)


@pytest.fixture
async def broker(anyio_backend: object) -> AsyncIterator[Broker]:
    async with Broker() as broker:
        yield broker


@pytest.fixture
async def proxy(broker: Broker) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(broker.host, broker.port) as proxy:
        yield proxy


@pytest.fixture
async def connection(proxy: FaultProxy, streams: list[ByteStream]) -> PacketConnection:
    """A connection through the proxy whose CONNECT was accepted."""
    return await connected(proxy.host, proxy.port, streams)


async def test_accepting_continues_after_descriptors_run_out(
    proxy: FaultProxy, streams: list[ByteStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sockets, "ACCEPT_RETRY_SECONDS", 0.01)
    sock = socket.socket()
    streams.append(SocketStream(sock))
    with awaiting_log("could not accept a connection") as failed, no_free_descriptors():
        sock.connect_ex((proxy.host, proxy.port))
        await failed.wait()
    assert await PacketConnection(streams[0]).ask(Connect()) == [ConnAck()]


async def connected(host: str, port: int, streams: list[ByteStream]) -> PacketConnection:
    connection = PacketConnection(await anyio.connect_tcp(host, port))
    streams.append(connection.stream)
    assert await connection.ask(Connect()) == [ConnAck()]
    return connection


async def read_to_end(stream: ByteStream) -> bytes:
    received = b""
    while True:
        try:
            received += await stream.receive()
        except (EndOfStream, BrokenResourceError):
            return received


class RawSocket:
    """A client's socket that detects a reset, which some versions of AnyIO do not on asyncio."""

    def __init__(self, proxy: FaultProxy) -> None:
        self._sock = socket.create_connection((proxy.host, proxy.port))
        self._sock.setblocking(False)

    async def connect(self) -> None:
        self.send(Connect())
        await anyio.wait_readable(self._sock)
        assert self._sock.recv(4) == ConnAck().encode()

    def send(self, packet: Packet) -> None:
        self._sock.sendall(packet.encode())

    async def is_reset(self) -> bool:
        """Read until the connection ends, and return whether it was reset."""
        with self._sock:
            while True:
                await anyio.wait_readable(self._sock)
                try:
                    if not self._sock.recv(65536):
                        return False
                except ConnectionResetError:
                    return True


class TestForwarding:
    async def test_host_port_and_url(self, proxy: FaultProxy, broker: Broker) -> None:
        assert proxy.host == "127.0.0.1"
        assert proxy.port not in (0, broker.port)
        assert proxy.url == f"mqtt://127.0.0.1:{proxy.port}"

    async def test_bytes_are_forwarded_in_both_directions(
        self, proxy: FaultProxy, connection: PacketConnection
    ) -> None:
        messages = [Publish("emitter/me/", bytes(60000), 1, each) for each in range(1, 50)]
        answers = await connection.ask(*messages)
        assert [packet.packet_id for packet in answers if isinstance(packet, PubAck)] == [
            *range(1, 50)
        ]

    async def test_emitter_client_through_the_proxy(
        self, proxy: FaultProxy, broker: Broker
    ) -> None:
        key = broker.keygen("a/")
        async with connect(proxy.url) as emitter, emitter.subscribe(key, "a/") as messages:
            await emitter.publish(key, "a/", "through")
            assert (await messages.receive()).as_string() == "through"

    async def test_websocket_over_tls_through_the_proxy(self, streams: list[ByteStream]) -> None:
        async with (
            Broker(ssl_context=tls.server_context()) as broker,
            FaultProxy(broker.host, broker.port) as proxy,
        ):
            stream = await TLSStream.wrap(
                await anyio.connect_tcp(proxy.host, proxy.port),
                hostname=proxy.host,
                ssl_context=tls.client_context(),
                standard_compatible=False,
            )
            streams.append(stream)
            connection = PacketConnection(await WebSocketStream.connect(stream))
            assert await connection.ask(Connect()) == [ConnAck()]

    async def test_end_of_a_client_is_forwarded(
        self, proxy: FaultProxy, broker: Broker, connection: PacketConnection
    ) -> None:
        [client] = broker.clients
        await connection.stream.aclose()
        await client.wait_closed()

    async def test_reset_of_a_client_is_forwarded(
        self, proxy: FaultProxy, broker: Broker, connection: PacketConnection
    ) -> None:
        [client] = broker.clients
        connection.stream.extra(SocketAttribute.raw_socket).setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        await connection.stream.aclose()
        await client.wait_closed()

    async def test_end_of_the_broker_is_forwarded(
        self, proxy: FaultProxy, broker: Broker, connection: PacketConnection
    ) -> None:
        await broker.drop()
        assert await connection.read_to_end() == []

    async def test_client_is_reset_without_a_broker(self) -> None:
        async with Broker() as broker:
            gone = broker.port
        async with FaultProxy("127.0.0.1", gone) as proxy:
            assert await RawSocket(proxy).is_reset()


class TestEntering:
    async def test_entering_again(self, broker: Broker, streams: list[ByteStream]) -> None:
        proxy = FaultProxy(broker.host, broker.port)
        for _ in range(2):
            async with proxy:
                connection = await connected(proxy.host, proxy.port, streams)
                [client] = broker.clients
            await client.wait_closed()
            assert await connection.read_to_end() == []

    async def test_run_until_cancelled(self, broker: Broker, streams: list[ByteStream]) -> None:
        proxy = FaultProxy(broker.host, broker.port)
        async with anyio.create_task_group() as tasks:
            assert await tasks.start(proxy.run) is proxy
            connection = await connected(proxy.host, proxy.port, streams)
            tasks.cancel_scope.cancel()
        assert await connection.read_to_end() == []

    async def test_exception_group_of_the_block_is_not_wrapped(self, broker: Broker) -> None:
        group = ExceptionGroup("raised in the block", [ValueError()])
        with pytest.raises(ExceptionGroup) as info:
            async with FaultProxy(broker.host, broker.port):
                raise group
        assert info.value is group

    async def test_block_can_be_cancelled(self, broker: Broker, streams: list[ByteStream]) -> None:
        with anyio.CancelScope() as scope:
            async with FaultProxy(broker.host, broker.port) as proxy:
                await connected(proxy.host, proxy.port, streams)
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught
        assert await read_to_end(streams[0]) == b""


class TestCut:
    @pytest.mark.parametrize("reset", [True, False])
    async def test_cut_closes_all_connections(
        self, proxy: FaultProxy, broker: Broker, reset: bool
    ) -> None:
        connections = [RawSocket(proxy), RawSocket(proxy)]
        for connection in connections:
            await connection.connect()
        clients = broker.clients
        await proxy.cut(reset=reset)
        for connection in connections:
            assert await connection.is_reset() == reset
        for client in clients:
            await client.wait_closed()

    async def test_new_connections_are_accepted_after_cut(
        self, proxy: FaultProxy, streams: list[ByteStream]
    ) -> None:
        await proxy.cut()
        for _ in range(2):
            await connected(proxy.host, proxy.port, streams)
            await proxy.cut()

    async def test_emitter_client_raises_connection_lost_error(self, proxy: FaultProxy) -> None:
        with pytest.raises(ConnectionLostError):
            async with connect(proxy.url, reconnect=None):
                await proxy.cut()
                await anyio.sleep_forever()

    @pytest.mark.parametrize("reset", [True, False])
    @pytest.mark.parametrize("count", [0, 1, 2])
    async def test_cut_after_bytes(
        self, proxy: FaultProxy, broker: Broker, count: int, reset: bool
    ) -> None:
        connection = RawSocket(proxy)
        await connection.connect()
        [client] = broker.clients
        proxy.cut_after(count, "to_broker", reset=reset)
        connection.send(PingReq())
        assert await connection.is_reset() == reset
        await client.wait_closed()

    async def test_cut_after_cuts_once(self, proxy: FaultProxy, streams: list[ByteStream]) -> None:
        proxy.cut_after(0, "to_client")
        connection = RawSocket(proxy)
        connection.send(Connect())
        assert await connection.is_reset()
        await connected(proxy.host, proxy.port, streams)


class TestHalfClose:
    async def test_client_can_send_after_its_receive_side_ends(
        self,
        proxy: FaultProxy,
        broker: Broker,
        connection: PacketConnection,
        streams: list[ByteStream],
    ) -> None:
        listener = await connected(broker.host, broker.port, streams)
        key = broker.keygen("a/")
        await listener.ask(Subscribe(1, ((f"{key}/a/", 0),)))
        await proxy.half_close("to_client")
        assert await connection.read_to_end() == []
        await connection.send(PingReq(), Publish(f"{key}/a/", b"still here"))
        assert await listener.receive() == Publish("a/", b"still here")
        assert len(broker.clients) == 2

    async def test_broker_closes_the_connection_after_its_receive_side_ends(
        self, proxy: FaultProxy, broker: Broker, connection: PacketConnection
    ) -> None:
        [client] = broker.clients
        await proxy.half_close("to_broker")
        await client.wait_closed()
        assert await connection.read_to_end() == []

    async def test_half_close_twice_or_without_connections(
        self, proxy: FaultProxy, connection: PacketConnection
    ) -> None:
        for _ in range(2):
            await proxy.half_close("to_client")
        await proxy.cut()
        await proxy.half_close("to_client")
        assert await connection.read_to_end() == []


class TestInvalidArguments:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda proxy: proxy.cut_after(-1, "to_client"), "at least 0 bytes, got -1"),
            (lambda proxy: proxy.stall_after(-1, "to_client"), "at least 0 bytes, got -1"),
            (lambda proxy: proxy.split(0), "at least 1 byte, got 0"),
            (lambda proxy: proxy.delay(-1), "at least 0, got -1"),
        ],
    )
    def test_invalid_argument_raises(
        self, call: Callable[[FaultProxy], None], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            call(FaultProxy("127.0.0.1", 1))


class Endpoints:
    """The two ends of a direction. ``receive()`` adds the seconds since the creation."""

    def __init__(self, source: MemoryStream, sink: MemoryStream) -> None:
        self.source = source
        self.sink = sink
        self._start = anyio.current_time()

    async def receive(self) -> tuple[float, bytes]:
        data = await self.sink.receive()
        return round(anyio.current_time() - self._start, 6), data


@pytest.mark.virtual_time
class TestTime:
    """Connections in memory, which do not join pieces, in virtual time."""

    @pytest.fixture
    def proxy(self) -> FaultProxy:
        return FaultProxy("nowhere", 0)

    @pytest.fixture
    async def ends(self, proxy: FaultProxy) -> AsyncIterator[dict[Direction, Endpoints]]:
        """The ends of each direction."""
        client, near = MemoryStream.pair()
        far, broker = MemoryStream.pair()
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(proxy._join, near, far)
            await anyio.wait_all_tasks_blocked()
            yield {"to_broker": Endpoints(client, broker), "to_client": Endpoints(broker, client)}
            task_group.cancel_scope.cancel()
        for stream in (client, near, far, broker):
            await stream.aclose()

    @pytest.mark.parametrize("direction", DIRECTIONS)
    async def test_stall_and_resume(
        self, proxy: FaultProxy, ends: dict[Direction, Endpoints], direction: Direction
    ) -> None:
        end = ends.pop(direction)
        [other] = ends.values()
        proxy.stall(direction)
        proxy.stall(direction)
        await end.source.send(b"held")
        await other.source.send(b"not held")
        assert await other.receive() == (0, b"not held")
        await anyio.sleep(3600)
        proxy.resume(direction)
        proxy.resume(direction)
        assert await end.receive() == (3600, b"held")

    async def test_stall_applies_to_both_directions_by_default(
        self, proxy: FaultProxy, ends: dict[Direction, Endpoints]
    ) -> None:
        proxy.stall()
        for end in ends.values():
            await end.source.send(b"held")
        await anyio.sleep(60)
        proxy.resume("to_broker")
        assert await ends["to_broker"].receive() == (60, b"held")
        await anyio.sleep(60)
        proxy.resume()
        assert await ends["to_client"].receive() == (120, b"held")

    async def test_stalled_direction_stops_reading(
        self, proxy: FaultProxy, ends: dict[Direction, Endpoints]
    ) -> None:
        end = ends["to_broker"]
        proxy.stall("to_broker")
        sent = 0
        with anyio.move_on_after(3600):
            while True:
                await end.source.send(b"x")
                sent += 1
        assert sent <= 6
        proxy.resume()
        for _ in range(sent):
            assert await end.receive() == (3600, b"x")

    @pytest.mark.parametrize("direction", DIRECTIONS)
    async def test_stall_after(
        self, proxy: FaultProxy, ends: dict[Direction, Endpoints], direction: Direction
    ) -> None:
        proxy.stall_after(5, direction)
        await ends[direction].source.send(b"abc")
        await ends[direction].source.send(b"defg")
        assert await ends[direction].receive() == (0, b"abc")
        assert await ends[direction].receive() == (0, b"de")
        await anyio.sleep(60)
        proxy.resume(direction)
        assert await ends[direction].receive() == (60, b"fg")

    @pytest.mark.parametrize("direction", DIRECTIONS)
    async def test_split(
        self, proxy: FaultProxy, ends: dict[Direction, Endpoints], direction: Direction
    ) -> None:
        proxy.split(3, direction)
        for end in ends.values():
            await end.source.send(b"abcdefg")
        pieces = [b"abc", b"def", b"g"]
        for way, end in ends.items():
            for piece in pieces if way == direction else [b"abcdefg"]:
                assert await end.receive() == (0, piece)
        proxy.split(None)
        await ends[direction].source.send(b"abcdefg")
        assert await ends[direction].receive() == (0, b"abcdefg")

    @pytest.mark.parametrize("direction", DIRECTIONS)
    async def test_delay(
        self, proxy: FaultProxy, ends: dict[Direction, Endpoints], direction: Direction
    ) -> None:
        proxy.delay(10, direction)
        for data in (b"a", b"b", b"c"):
            for end in ends.values():
                await end.source.send(data)
            await anyio.sleep(1)
        delayed = ends.pop(direction)
        for data in (b"a", b"b", b"c"):
            for end in ends.values():
                assert await end.receive() == (3, data)  # received at the end of the loop above
        for sent, data in enumerate((b"a", b"b", b"c")):
            assert await delayed.receive() == (sent + 10, data)

    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 8])
    async def test_exact_number_of_bytes_is_forwarded_before_a_cut(
        self, proxy: FaultProxy, ends: dict[Direction, Endpoints], direction: Direction, count: int
    ) -> None:
        end = ends[direction]
        proxy.cut_after(count, direction, reset=False)
        for start in range(0, max(count, 1), 3):
            await end.source.send(b"abcdefghij"[start : start + 3])
        assert await read_to_end(end.source) == b""
        assert await read_to_end(end.sink) == b"abcdefghij"[:count]

    async def test_half_closed_direction_is_still_read(
        self, proxy: FaultProxy, ends: dict[Direction, Endpoints]
    ) -> None:
        end = ends["to_client"]
        await proxy.half_close("to_client")
        with anyio.fail_after(1):
            for _ in range(100):
                await end.source.send(b"x")
        assert await read_to_end(end.sink) == b""
        await end.source.aclose()
        assert await read_to_end(ends["to_broker"].source) == b""

    async def test_broken_side_resets_the_other(
        self, proxy: FaultProxy, ends: dict[Direction, Endpoints]
    ) -> None:
        end = ends["to_broker"]
        end.sink.break_receiving()
        await end.source.send(b"a")
        assert await read_to_end(end.source) == b""
        await anyio.wait_all_tasks_blocked()
        assert proxy._connections == {}
