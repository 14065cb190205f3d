"""WebSocket: the protocol without I/O, the transport in memory, and the client over sockets."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream
from anyio.lowlevel import checkpoint
from anyio.streams.tls import TLSAttribute, TLSStream
from hypothesis import example, given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, Pong, Request, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import generate_accept_token

from emitter_anyio import ConnectError, ConnectionLostError, Emitter, RemoteProtocolError, connect
from emitter_anyio._net.options import make_options
from emitter_anyio._net.tls import explain
from emitter_anyio._net.transport import (
    SocketTransport,
    StreamTransport,
    WebSocketTransport,
    host_header,
)
from emitter_anyio._net.websocket import MAX_HEAD_BYTES, Upgrade, WebSocket, _FrameChecks
from emitter_anyio.testing import Broker
from tests.support import packets, tls
from tests.support.connections import connect_once
from tests.support.memory import MemoryStream, memory_stream_pair
from tests.support.peer import DISCONNECT, PINGREQ, PUBLISH, Peer, memory_peer, serving, tcp_peer
from tests.support.websocket import ServerStream

MAX = 1024
NORMAL = CloseConnection(1000, "")
SWITCHING = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: %b\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
)


def header(upgrade: Upgrade, name: str) -> str:
    """Return a header of the request."""
    [value] = [
        line.partition(": ")[2]
        for line in upgrade.request.decode().split("\r\n")
        if line.lower().startswith(f"{name.lower()}: ")
    ]
    return value


def accept(upgrade: Upgrade) -> bytes:
    """Return the response that accepts the request."""
    return SWITCHING % generate_accept_token(header(upgrade, "Sec-WebSocket-Key").encode())


def cut(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """Cut data into pieces of the given sizes."""
    chunks = []
    for size in cuts:
        chunks.append(data[:size])
        data = data[size:]
    return [chunk for chunk in (*chunks, data) if chunk]


def server() -> Connection:
    return Connection(ConnectionType.SERVER)


def frames(*events: Event) -> bytes:
    peer = server()
    return b"".join(bytes(peer.send(event)) for event in events)


def events(data: bytes) -> list[Event]:
    """Decode bytes as a server does."""
    peer = server()
    peer.receive_data(data)
    return list(peer.events())


class TestHandshake:
    def test_request_offers_the_mqtt_subprotocol(self) -> None:
        upgrade = Upgrade("h:8080", "/a%20b")
        assert upgrade.request.startswith(b"GET /a%20b HTTP/1.1\r\n")
        assert upgrade.request.endswith(b"\r\n\r\n")
        assert header(upgrade, "Host") == "h:8080"
        assert header(upgrade, "Sec-WebSocket-Protocol") == "mqtt"
        assert header(upgrade, "Sec-WebSocket-Version") == "13"
        assert not upgrade.refused

    def test_each_request_has_its_own_key(self) -> None:
        keys = {header(Upgrade("h", "/"), "Sec-WebSocket-Key") for _ in range(10)}
        assert len(keys) == 10

    @pytest.mark.parametrize("host", ["x" * 64, "a\0b"])
    def test_bad_host_raises(self, host: str) -> None:
        with pytest.raises(OSError, match="host"):
            Upgrade(host, "/")

    @given(st.lists(st.integers(0, 60)), st.binary(max_size=20))
    def test_response_can_arrive_in_any_pieces(self, cuts: list[int], trailing: bytes) -> None:
        upgrade = Upgrade("h", "/")
        received: bytes | None = None
        for chunk in cut(accept(upgrade) + trailing, cuts):
            if received is None:
                received = upgrade.receive(chunk)
            else:
                received += chunk
        assert received == trailing

    def test_response_without_a_subprotocol_is_accepted(self) -> None:
        upgrade = Upgrade("h", "/")
        assert upgrade.receive(accept(upgrade).replace(b"-Protocol: mqtt", b"-Else: x")) == b""

    def test_response_lines_can_end_with_a_bare_newline(self) -> None:
        upgrade = Upgrade("h", "/")
        assert upgrade.receive(accept(upgrade).replace(b"\r\n", b"\n") + b"x") == b"x"

    @pytest.mark.parametrize(
        ("old", "new", "pattern"),
        [
            (b"Accept: ", b"Accept: A", "Bad accept token"),
            (b"Connection: Upgrade", b"Connection: close", "Connection: Upgrade"),
            (b"Upgrade: websocket", b"Upgrade: h2c", "(?i)Upgrade: websocket"),
            (b"Protocol: mqtt", b"Protocol: soap", "unrecognized subprotocol soap"),
            (
                b"Protocol: mqtt",
                b"Protocol: " + b"x" * 5000,
                r"unrecognized subprotocol x{170,180}…$",
            ),
            (b"Protocol: mqtt", b"Protocol: \xff", "codec"),
            (b"Protocol: mqtt", b"Extensions: permessage-deflate", "unrecognized extension"),
            (b"Protocol: mqtt", b"no header", "Bad HTTP message"),
        ],
    )
    def test_wrong_response_raises_remote_protocol_error(
        self, old: bytes, new: bytes, pattern: str
    ) -> None:
        upgrade = Upgrade("h", "/")
        with pytest.raises(RemoteProtocolError, match=pattern) as caught:
            upgrade.receive(accept(upgrade).replace(old, new))
        assert len(str(caught.value)) < 300

    @pytest.mark.parametrize(
        ("data", "pattern"),
        [
            (b"\x15\x03\x01\x00\x02\x02\x16", "try wss://"),
            (b"\x15", "try wss://"),
            (packets.CONNACK, "HTTP"),
            (b"SSH-2.0-x\r\n", "HTTP"),
            (b"HTTP/2", "HTTP"),
            (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 3000, f"{MAX_HEAD_BYTES} bytes"),
        ],
    )
    def test_other_protocol_raises_remote_protocol_error(self, data: bytes, pattern: str) -> None:
        for size in (1, len(data)):
            upgrade = Upgrade("h", "/")
            with pytest.raises(RemoteProtocolError, match=pattern):
                for chunk in cut(data, [size] * len(data)):
                    assert upgrade.receive(chunk) is None

    def test_end_of_data_in_the_handshake_raises_eof_error(self) -> None:
        upgrade = Upgrade("h", "/")
        assert upgrade.receive(b"HTTP/1.1 101 Sw") is None
        with pytest.raises(EOFError, match="handshake"):
            upgrade.receive(b"")


NO_BODY = b"Content-Length: 0\r\n\r\n"
REFUSED = [
    ("404 X", NO_BODY, r"HTTP 404 \(Not Found\).*path"),
    ("404 X", b"Content-Length: 9\r\n\r\nno page\n\n", r"Found.*'no page'"),
    ("200 X", b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", "200 .*'ab'"),
    ("403 X", b"Content-Length: 500\r\n\r\n" + b"x" * 300, "'x{200}…?'.*in front"),
    ("401 X", b"Content-Length: 1\r\n\r\n\x1b", r"401.*'\?'"),
    ("502 X", b"Content-Length: 2\r\n\r\n\xff\xff", "502.*'\ufffd\ufffd'"),
    ("299 X", NO_BODY, r"HTTP 299"),
    ("100 X", b"\r\n", r"HTTP 100 \(Continue\)"),
    ("301 X", b"Location: wss://h/m?key=1\r\n" + NO_BODY, "wss://h/m"),
    ("302 X", NO_BODY, "redirects"),
]


class TestRefusal:
    @pytest.mark.parametrize(("status", "rest", "pattern"), REFUSED)
    @pytest.mark.parametrize("size", [1, 7, 10000])
    def test_response_is_in_the_error(
        self, status: str, rest: bytes, pattern: str, size: int
    ) -> None:
        upgrade = Upgrade("h", "/")
        data = f"HTTP/1.1 {status}\r\n".encode() + rest
        with pytest.raises(ConnectError, match=pattern) as caught:
            for chunk in cut(data, [size] * len(data)):
                assert upgrade.receive(chunk) is None
        assert upgrade.refused
        assert len(str(caught.value)) < 600
        assert "key=" not in str(caught.value)

    @pytest.mark.parametrize(
        ("rest", "end"),
        [
            (b"\r\nsome", b" words"),
            (b"Content-Length: 100\r\n\r\nsome", b" words"),
            (b"Transfer-Encoding: chunked\r\n\r\na\r\nsome words\r\n", b"nonsense\r\n"),
        ],
    )
    def test_incomplete_response_is_in_the_error(self, rest: bytes, end: bytes) -> None:
        upgrade = Upgrade("h", "/")
        assert upgrade.receive(b"HTTP/1.1 503 X\r\n" + rest) is None
        assert upgrade.refused
        with pytest.raises(ConnectError, match="'some words'"):
            for data in (end, b""):
                assert upgrade.receive(data) is None


class TestFrames:
    @given(
        st.lists(
            st.one_of(
                st.builds(BytesMessage, st.binary(max_size=200), st.just(True), st.booleans()),
                st.builds(Ping, st.binary(max_size=125)),
                st.builds(Pong, st.binary(max_size=125)),
            )
        ),
        st.lists(st.integers(0, 40)),
    )
    def test_received_frames_form_one_stream(
        self, sent: list[BytesMessage | Ping | Pong], cuts: list[int]
    ) -> None:
        websocket = WebSocket(MAX)
        payload = [websocket.receive(chunk) for chunk in cut(frames(*sent), cuts)]
        messages = [event.data for event in sent if isinstance(event, BytesMessage)]
        assert b"".join(payload) == b"".join(messages)
        assert websocket.open
        pings = [event for event in sent if isinstance(event, Ping)]
        answers = events(websocket.pong)
        assert answers == [ping.response() for ping in pings[-1:]]

    @given(st.lists(st.binary(max_size=70000), max_size=5), st.lists(st.integers(0, 5000)))
    def test_sent_frames_contain_the_data(self, sent: list[bytes], cuts: list[int]) -> None:
        websocket, peer = WebSocket(MAX), server()
        received: list[Event] = []
        for chunk in cut(b"".join(map(websocket.wrap, sent)) + websocket.close(), cuts):
            peer.receive_data(chunk)
            received += peer.events()
        assert received.pop() == NORMAL
        payload = [event.data for event in received if isinstance(event, BytesMessage)]
        assert len(payload) == len(received)
        assert b"".join(payload) == b"".join(sent)

    def test_sent_frames_are_masked(self) -> None:
        assert b"secret" not in b"".join(WebSocket(MAX).wrap(b"secret") for _ in range(10))

    def test_payload_is_returned_before_the_frame_is_complete(self) -> None:
        websocket = WebSocket(70000)
        data = frames(BytesMessage(bytes(60000)))
        assert [len(websocket.receive(chunk)) for chunk in cut(data, [1004, 9000])] == [
            1000,
            9000,
            50000,
        ]

    def test_frame_can_be_as_large_as_a_packet(self) -> None:
        websocket = WebSocket(MAX)
        assert websocket.receive(frames(BytesMessage(bytes(MAX + 5)))) == bytes(MAX + 5)
        assert websocket.open

    @pytest.mark.parametrize("size", [MAX + 6, 70000, 1 << 62])
    def test_oversized_frame_is_rejected_by_its_header(self, size: int) -> None:
        websocket = WebSocket(MAX)
        head = b"\x82\x7e" + size.to_bytes(2) if size < 65536 else b"\x82\x7f" + size.to_bytes(8)
        assert websocket.receive(frames(BytesMessage(b"before")) + head) == b"before"
        assert isinstance(websocket.end, RemoteProtocolError)
        assert f"a frame of {size} bytes, which exceeds max_message_size (1024)" in str(
            websocket.end
        )
        assert events(websocket.close()) == [CloseConnection(1009, "")]

    @pytest.mark.parametrize(
        ("invalid", "code", "pattern"),
        [
            (frames(TextMessage("hello")), 1003, "a text frame, but MQTT requires binary frames"),
            (b"\x81\x02\xff\xff", 1003, "a text frame"),
            (b"\x82\x81\0\0\0\0x", 1002, "masked"),
            (b"\xc2\x00", 1002, "Reserved bit"),
            (b"\x83\x00", 1002, "Invalid opcode"),
            (b"\x80\x00", 1002, "CONTINUATION"),
            (b"\x02\x00\x82\x00", 1002, "CONTINUATION"),
            (b"\x09\x00", 1002, "fragment control frame"),
            (b"\x89\x7e\x00\x7e", 1002, "Control frame"),
            (b"\x82\x7e\x00\x01", 1002, "would have sufficed"),
            (b"\x88\x01\x03", 1002, "CLOSE with 1 byte"),
            (b"\x88\x02\x00\x00", 1002, "invalid code"),
            (b"\x88\x02\x03\xed", 1002, "local-only"),
            (b"\x88\x03\x03\xe8\xff", 1007, "CLOSE reason"),
        ],
    )
    def test_invalid_frame_ends_the_connection(
        self, invalid: bytes, code: int, pattern: str
    ) -> None:
        websocket = WebSocket(MAX)
        assert websocket.receive(frames(BytesMessage(b"before")) + invalid) == b"before"
        assert isinstance(websocket.end, RemoteProtocolError)
        assert pattern in str(websocket.end)
        assert not websocket.open
        assert websocket.receive(frames(BytesMessage(b"after"))) == b""
        assert websocket.wrap(b"x") == b""
        assert events(websocket.close()) == [CloseConnection(code, "")]
        assert websocket.close() == b""

    def test_frame_limit_is_not_offered_as_an_extension(self) -> None:
        assert not _FrameChecks(MAX).offer()

    def test_only_the_last_unanswered_ping_is_answered(self) -> None:
        websocket = WebSocket(MAX)
        websocket.receive(frames(*(Ping(b"%d" % number) for number in range(1000))))
        while websocket.turn_over:
            websocket.receive(b"")
        assert events(websocket.pong) == [Pong(b"999")]


class TestClose:
    @pytest.mark.parametrize(
        ("close", "pattern"),
        [
            (CloseConnection(1001, "restart"), "code 1001 (going away), 'restart'"),
            (CloseConnection(1000), "code 1000 (normal closure)"),
            (CloseConnection(4001, "a\nb\x1b"), "code 4001, 'a b?'"),
            (CloseConnection(CloseReason.NO_STATUS_RCVD), "code 1005 (no status rcvd)"),
        ],
    )
    def test_close_by_the_peer_is_reported_and_answered(
        self, close: CloseConnection, pattern: str
    ) -> None:
        websocket = WebSocket(MAX)
        assert websocket.receive(frames(Ping(b"x"), BytesMessage(b"last"), close)) == b"last"
        assert isinstance(websocket.end, EOFError)
        assert str(websocket.end) == f"the broker closed the WebSocket connection: {pattern}"
        answer = events(websocket.close())
        assert answer[0] == Pong(b"x")
        assert isinstance(answer[1], CloseConnection)
        assert answer[1].code == close.code
        assert websocket.pong == websocket.close() == b""

    def test_close_by_the_client_lets_the_peer_finish(self) -> None:
        websocket = WebSocket(MAX)
        assert events(websocket.close()) == [NORMAL]
        assert not websocket.open
        assert websocket.wrap(b"x") == websocket.close() == b""
        assert websocket.receive(frames(Ping(b"x"), BytesMessage(b"last"))) == b"last"
        assert websocket.pong == b""
        assert websocket.end is None
        websocket.receive(frames(CloseConnection(1000)))
        assert isinstance(websocket.end, EOFError)
        assert websocket.close() == b""

    def test_invalid_frame_after_close_by_the_client(self) -> None:
        websocket = WebSocket(MAX)
        websocket.close()
        websocket.receive(b"\xff")
        websocket.receive(b"\xff")
        assert isinstance(websocket.end, RemoteProtocolError)
        assert websocket.close() == b""


class TestHostileBytes:
    @given(
        st.one_of(
            st.binary(),
            st.builds(b"HTTP/1.1 %d X\r\n".__mod__, st.integers(0, 999)),
            st.just(SWITCHING),
        ),
        st.lists(st.sampled_from([b"\r\n", b"Content-Length: 5\r\n", b"Location: \xff\r\n", b"a"])),
        st.binary(),
        st.lists(st.integers(0, 20)),
    )
    @example(b"HTTP/1.1 200 X\r\n", [b"Content-Length: 5\r\n", b"\r\n"], b"123456", [])
    def test_handshake_rejects_any_other_bytes(
        self, start: bytes, lines: list[bytes], end: bytes, cuts: list[int]
    ) -> None:
        upgrade = Upgrade("h", "/")
        with pytest.raises((ConnectError, RemoteProtocolError, EOFError)) as caught:
            for chunk in (*cut(start + b"".join(lines) + end, cuts), b""):
                assert upgrade.receive(chunk) is None
        assert len(str(caught.value)) < 600
        assert str(caught.value).isprintable()

    @given(st.binary(), st.lists(st.integers(0, 20)))
    def test_frames_from_any_bytes_wait_or_end_the_connection(
        self, data: bytes, cuts: list[int]
    ) -> None:
        websocket = WebSocket(MAX)
        payload = b"".join(map(websocket.receive, cut(data, cuts)))
        assert len(payload) <= len(data)
        assert len(websocket.pong) <= 131
        if websocket.end is not None:
            assert isinstance(websocket.end, RemoteProtocolError | EOFError)
            assert str(websocket.end).isprintable()
        websocket.close()


# The transport


def transport_over(stream: ByteStream) -> WebSocketTransport:
    return WebSocketTransport(StreamTransport(stream), WebSocket(MAX), b"")


async def test_data_after_the_handshake_is_received(anyio_backend: object) -> None:
    own_end, peer = memory_stream_pair()
    received = frames(BytesMessage(b"early"))
    transport = WebSocketTransport(StreamTransport(own_end), WebSocket(MAX), received)
    assert await transport.receive() == b"early"
    await peer.send_eof()
    assert await transport.receive() == b""
    await transport.aclose()


async def test_empty_frames_do_not_end_the_stream(anyio_backend: object) -> None:
    own_end, peer = memory_stream_pair()
    transport = transport_over(own_end)
    await peer.send(frames(BytesMessage(b""), Pong(b"")))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(peer.send, frames(BytesMessage(b"x")))
        assert await transport.receive() == b"x"
    await transport.aclose()


async def test_partial_frame_is_finished_before_the_next(anyio_backend: object) -> None:
    own_end, theirs = socket.socketpair()
    own_end.setblocking(False)
    theirs.setblocking(False)
    transport = WebSocketTransport(SocketTransport(own_end), WebSocket(MAX), b"")
    size = 65536
    sent = 0
    with theirs:
        # The socket accepts part of one frame, and then nothing.
        while sent_size := transport.try_send(bytes(size)):
            sent += sent_size
        assert transport._unsent
        peer, payload, closed = server(), b"", False
        peer.receive_data(theirs.recv(1 << 20))
        # The socket has space again, but the partial frame must be finished first.
        assert transport.try_send(b"x") == 0

        async def send() -> None:
            await transport.send(b"last")
            await transport.send_eof()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            while not closed:
                await anyio.wait_readable(theirs)
                peer.receive_data(theirs.recv(1 << 20))
                for event in peer.events():
                    if isinstance(event, BytesMessage):
                        payload += event.data
                    closed = event == NORMAL
        assert payload == bytes(sent) + b"last"
        # Data after a close is discarded without an error.
        assert transport.try_send(b"x") == 0
        assert await transport.send(b"x") == 1
        await transport.aclose()
        assert theirs.recv(1) == b""
    await transport.aclose()


async def test_full_socket_accepts_no_frame(anyio_backend: object) -> None:
    own_end, theirs = socket.socketpair()
    own_end.setblocking(False)
    with theirs:
        with suppress(BlockingIOError):
            while True:
                own_end.send(bytes(65536))
        transport = WebSocketTransport(SocketTransport(own_end), WebSocket(MAX), b"")
        assert transport.try_send(b"x") == 0
        assert not transport._unsent
        await transport.aclose()


@pytest.mark.parametrize("end", [CloseConnection(1001, "restart"), TextMessage("hello")])
async def test_send_after_the_peers_close_raises(anyio_backend: object, end: Event) -> None:
    own_end, theirs = socket.socketpair()
    own_end.setblocking(False)
    with theirs:
        transport = WebSocketTransport(SocketTransport(own_end), WebSocket(MAX), b"")
        theirs.send(frames(BytesMessage(b"x"), end))
        assert await transport.receive() == b"x"
        assert transport.try_send(b"y") == 0
        pattern = "restart|text frame"
        with pytest.raises((EOFError, RemoteProtocolError), match=pattern):
            await transport.send(b"y")
        for _ in range(2):
            with pytest.raises((EOFError, RemoteProtocolError), match=pattern):
                await transport.receive()
        assert [type(event) for event in events(theirs.recv(100))] == [CloseConnection]
        await transport.aclose()


async def test_closing_twice(anyio_backend: object) -> None:
    own_end, peer = memory_stream_pair()
    transport = transport_over(own_end)
    await transport.aclose()
    await transport.send_eof()
    await transport.aclose()
    assert own_end.closed
    await peer.aclose()


@pytest.mark.virtual_time
async def test_close_answer_to_a_stalled_peer_is_given_up_after_a_second(
    anyio_backend: object,
) -> None:
    own_end, peer = memory_stream_pair(capacity=1)
    transport = transport_over(own_end)
    peer.send_nowait(frames(CloseConnection(1001, "restart")))
    start = anyio.current_time()
    with pytest.raises(EOFError, match="restart"):
        await transport.receive()
    assert anyio.current_time() - start == pytest.approx(1)
    await transport.aclose()


# The client, in memory


def connect_to(connectable: Any, **options: Any) -> Emitter:
    return connect_once("ws://broker.example/mqtt", connectable=connectable, **options)


def stream_of(peer: Peer) -> ServerStream:
    assert isinstance(peer.stream, ServerStream)
    return peer.stream


async def test_ws_url_uses_websocket_over_a_connectable(anyio_backend: object) -> None:
    requests: list[Event | None] = []

    async def script(peer: Peer) -> None:
        requests.append(stream_of(peer).request)
        await peer.serve()

    async with memory_peer(script, websocket=True) as connectable:
        async with connect_to(connectable) as emitter:
            await emitter.flush()
    [request] = requests
    assert isinstance(request, Request)
    assert (request.host, request.target) == ("broker.example:8080", "/mqtt")
    assert request.subprotocols == ["mqtt"]


async def test_handshake_has_the_query_and_the_headers(
    anyio_backend: object, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    requests: list[Event | None] = []

    async def script(peer: Peer) -> None:
        requests.append(stream_of(peer).request)
        await peer.serve()

    async with memory_peer(script, websocket=True) as connectable:
        async with connect(
            "ws://broker.example/mqtt?token=secret&a=b%20c",
            connectable=connectable,
            headers={"Authorization": "Bearer secret", "X-Two": "2"},
        ) as emitter:
            await emitter.flush()
            assert emitter.connection is not None
            assert emitter.connection.server == "ws://broker.example:8080/mqtt"
            shown = f"{emitter!r} {emitter.connection!r} {caplog.text}"
    [request] = requests
    assert isinstance(request, Request)
    assert request.target == "/mqtt?token=secret&a=b%20c"
    headers = [(b"authorization", b"Bearer secret"), (b"x-two", b"2")]
    assert [(name.lower(), value) for name, value in request.extra_headers][-2:] == headers
    assert "/mqtt" in shown
    assert "secret" not in shown


async def test_query_and_headers_are_not_in_a_connect_error(anyio_backend: object) -> None:
    with pytest.raises(ConnectError, match="/mqtt") as caught:
        async with connect("ws://127.0.0.1:1/mqtt?token=secret", headers={"Cookie": "secret"}):
            pytest.fail("it connected")  # pragma: no cover
    error: BaseException | None = caught.value
    while error is not None:
        assert "secret" not in repr(error)
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("ws://h:80", "h"),
        ("ws://h:443", "h:443"),
        ("ws://[::1]:81", "[::1]:81"),
        ("ws://bücher.example", "xn--bcher-kva.example:8080"),
    ],
)
async def test_host_header_omits_the_default_port(
    anyio_backend: object, url: str, host: str
) -> None:
    requests = []

    async def script(peer: Peer) -> None:
        request = stream_of(peer).request
        assert isinstance(request, Request)
        requests.append(request.host)
        await peer.serve()

    async with memory_peer(script, websocket=True) as connectable:
        async with connect_once(url, connectable=connectable):
            pass
    assert [name.encode("idna").decode() for name in requests] == [host]


@pytest.mark.parametrize(("url", "host"), [("wss://h", "h"), ("wss://[::1]:80", "[::1]:80")])
def test_host_header_omits_the_default_port_with_tls(url: str, host: str) -> None:
    assert host_header(make_options(url, {}).servers[0]) == host


@pytest.mark.virtual_time
async def test_ping_is_answered_while_nothing_else_is_sent(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        stream = stream_of(peer)
        await stream.send_event(Ping(b"before CONNACK"))
        await peer.accept()
        accepted = anyio.current_time()
        assert await stream.until(Pong) == Pong(b"before CONNACK")
        # The answer did not wait for another packet, such as a PINGREQ.
        assert anyio.current_time() == accepted
        for number in range(3):
            await stream.send_event(Ping(b"%d" % number))
            assert await stream.until(Pong) == Pong(b"%d" % number)
        await peer.send(packets.publish("a/", b"done"))
        await peer.answer_all()

    async with memory_peer(script, websocket=True) as connectable:
        async with connect_to(connectable) as emitter, emitter.stream("message") as messages:
            assert (await messages.receive()).binary == b"done"
            start = anyio.current_time()
    assert anyio.current_time() == start


@pytest.mark.virtual_time
@pytest.mark.parametrize("capacity", [1, 100])
async def test_ping_is_answered_during_a_send(anyio_backend: object, capacity: int) -> None:
    payload = bytes(range(250)) * 2 * capacity

    async def script(peer: Peer) -> None:
        await peer.accept()
        stream = stream_of(peer)
        await anyio.sleep(0.1)
        # The client is in the middle of sending a frame, which answers must not interrupt.
        for number in range(10):
            await stream.send_event(Ping(b"%d" % number))
        await anyio.sleep(1)
        packet = await peer.until(PUBLISH)
        assert packet.payload == payload
        # Of the waiting pings, the last is answered.
        assert await stream.until(Pong) == Pong(b"9")
        await peer.answer_all()

    async with memory_peer(script, websocket=True, capacity=capacity) as connectable:
        async with connect_to(connectable) as emitter:
            await emitter.publish("k", "a/", payload)
            await anyio.sleep(0.5)
            connection = emitter._slot.connection
            assert connection is not None
            assert isinstance(connection._transport, WebSocketTransport)
            assert len(connection._transport._unsent) < len(payload) + 100
            await emitter.flush()


@pytest.mark.virtual_time
async def test_websocket_pings_do_not_count_as_received_from_the_broker(
    anyio_backend: object,
) -> None:
    # A proxy sends pings, even when its broker has failed.
    async def script(peer: Peer) -> None:
        await peer.accept()
        with suppress(anyio.BrokenResourceError):
            while True:
                await stream_of(peer).send_event(Ping())
                await anyio.sleep(0.1)

    async with memory_peer(script, websocket=True) as connectable:
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with connect_to(connectable, keepalive=2):
                await anyio.sleep_forever()


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("end", "pattern", "answer"),
    [
        (CloseConnection(1001, "restart"), r"1001 \(going away\), 'restart'", 1001),
        (CloseConnection(1008, "go"), r"1008 \(policy violation\), 'go'", 1008),
        (TextMessage("hello"), "a text frame", 1003),
        (BytesMessage(bytes(65536 + 6)), "exceeds max_message_size", 1009),
    ],
)
async def test_close_by_the_peer_raises_connection_lost_error(
    anyio_backend: object, end: Event, pattern: str, answer: int
) -> None:
    answered, received_close = [], anyio.Event()

    async def send_end(peer: Peer) -> None:
        # The client does not read an oversized frame to its end.
        with suppress(anyio.BrokenResourceError):
            await stream_of(peer).send_event(end)

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.send(packets.publish("a/", b"last"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_end, peer)
            close = await stream_of(peer).until(CloseConnection)
        assert isinstance(close, CloseConnection)
        answered.append(close.code)
        received_close.set()

    async with memory_peer(script, websocket=True) as connectable:
        emitter = connect_to(connectable)
        received = []
        emitter.on("message", lambda message: received.append(message.binary))
        with pytest.raises(ConnectionLostError, match=pattern):
            async with emitter:
                await anyio.sleep_forever()
        # The client has sent its close by then; wait until the peer has read it.
        await received_close.wait()
    assert received == [b"last"]
    assert answered == [answer]


async def test_close_by_the_peer_while_leaving_is_ignored(
    anyio_backend: object,
) -> None:
    full, left = anyio.Event(), anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await full.wait()
        # The peer reads nothing, so neither DISCONNECT nor an answer to its close can be sent.
        await stream_of(peer).send_event(CloseConnection(1001, "restart"))
        await left.wait()

    async with serving("ws", script) as options:
        async with connect_once(disconnect_timeout=0.05, **options) as emitter:
            while emitter.statistics().queued_bytes < 200_000:
                await emitter.publish("k", "a/", bytes(20_000))
                await checkpoint()
            full.set()
        assert emitter.state == "closed"
        left.set()


@pytest.mark.virtual_time
async def test_packets_and_frames_do_not_need_to_align(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        stream = stream_of(peer)
        data = b"".join(packets.publish("a/", b"%d" % number * 50) for number in range(20))
        await stream.send(data)
        for byte in data:
            await stream.send(bytes((byte,)))
        for start in range(0, len(data), 7):
            await stream.send_event(Ping())
            # Each frame is a fragment of one WebSocket message.
            part = data[start : start + 7]
            await stream.send_event(BytesMessage(part, message_finished=start + 7 >= len(data)))
        await peer.answer_all()

    async with memory_peer(script, websocket=True) as connectable:
        async with connect_to(connectable) as emitter, emitter.stream("message") as messages:
            received = [(await messages.receive()).binary for _ in range(60)]
    assert received == [b"%d" % number * 50 for number in range(20)] * 3


@pytest.mark.virtual_time
@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 101 Switch", b"HTTP/1.1 101 X\r\nUpgrade: w"])
async def test_peer_silent_in_the_handshake_times_out(anyio_backend: object, data: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(data)
        assert await peer.stream.receive()
        with pytest.raises(anyio.EndOfStream):
            await peer.stream.receive()

    async with memory_peer(script) as connectable:
        start = anyio.current_time()
        with pytest.raises(ConnectError, match=r"ws://.*within 10 s"):
            async with connect_to(connectable):
                pass
        assert anyio.current_time() - start == pytest.approx(10)
        assert connectable.streams[0].closed


@pytest.mark.virtual_time
async def test_peer_silent_after_the_handshake_times_out(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        assert await peer.packet() is not None
        assert await peer.packet() is None

    async with memory_peer(script, websocket=True) as connectable:
        with pytest.raises(ConnectError, match=r"ws://.*within 10 s"):
            async with connect_to(connectable):
                pass


@pytest.mark.virtual_time
async def test_body_of_a_refusal_is_awaited_for_a_second(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 100\r\n\r\nnot ")
        await anyio.sleep(0.5)
        await peer.send(b"you")
        with suppress(anyio.EndOfStream):
            while True:
                await peer.stream.receive()

    async with memory_peer(script) as connectable:
        start = anyio.current_time()
        with pytest.raises(ConnectError, match=r"HTTP 403 \(Forbidden\).*'not you'"):
            async with connect_to(connectable):
                pass
        assert anyio.current_time() - start == pytest.approx(1)
        assert connectable.streams[0].closed


async def test_server_that_closes_in_the_handshake(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.stream.receive()

    async with memory_peer(script) as connectable:
        with pytest.raises(ConnectError, match=r"closed.*handshake"):
            async with connect_to(connectable):
                pass


async def test_next_server_is_tried_after_a_refusal(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        if connectable.attempts == 1:
            await peer.send(b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n")
        else:
            peer.stream = await ServerStream.accept(peer.stream)
            await peer.serve()

    async with memory_peer(script) as connectable:
        servers = ["ws://a.example/x", "ws://b.example"]
        async with connect_once(servers=servers, connectable=connectable) as emitter:
            assert emitter.connection is not None
            assert emitter.connection.server == "ws://b.example:8080"


# The client, over sockets


@pytest.fixture(params=["ws", "wss"])
def scheme(request: pytest.FixtureRequest) -> str:
    scheme: str = request.param
    return scheme


def broker_of(scheme: str) -> tuple[Broker, dict[str, Any]]:
    """Return a broker, and the options with which a client trusts it."""
    if scheme == "ws":
        return Broker(), {}
    return Broker(ssl_context=tls.server_context()), {"ssl_context": tls.client_context()}


async def test_publish_and_receive(anyio_backend: object, scheme: str) -> None:
    broker, trust = broker_of(scheme)
    async with broker:
        key = broker.keygen("a/")
        url = f"{scheme}://127.0.0.1:{broker.port}/any/path"
        async with connect_once(url, **trust) as emitter:
            assert emitter.connection is not None
            assert emitter.connection.server == url
            async with emitter.subscribe(key, "a/") as messages:
                for size in (0, 1, 125, 126, 1000, 65000):
                    for qos in (0, 1):
                        await emitter.publish(key, "a/", bytes(size), qos=1 if qos else 0)
                        assert (await messages.receive()).binary == bytes(size)
                await emitter.flush()


async def test_many_messages_in_both_directions(anyio_backend: object, scheme: str) -> None:
    broker, trust = broker_of(scheme)
    async with broker:
        key = broker.keygen("a/")
        async with connect_once(f"{scheme}://127.0.0.1:{broker.port}", **trust) as emitter:
            async with emitter.subscribe(key, "a/", buffer=1000) as messages:

                async def publish() -> None:
                    for number in range(500):
                        await emitter.publish(key, "a/", b"%d" % number * 1000)

                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(publish)
                    for number in range(500):
                        assert (await messages.receive()).binary == b"%d" % number * 1000


@pytest.mark.parametrize("path", ["/keygen", "/health", "/debug/x"])
async def test_path_of_another_emitter_page_is_refused(
    anyio_backend: object, scheme: str, path: str
) -> None:
    broker, trust = broker_of(scheme)
    async with broker:
        with pytest.raises(ConnectError, match=r"HTTP (200|404).*/keygen"):
            async with connect_once(f"{scheme}://127.0.0.1:{broker.port}{path}", **trust):
                pass


@pytest.mark.parametrize("unacknowledged", [False, True])
async def test_close_is_sent_after_disconnect(
    anyio_backend: object, scheme: str, unacknowledged: bool
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.answer(await peer.until(PINGREQ))
        await peer.until(DISCONNECT)
        closes.append(await stream_of(peer).until(CloseConnection))
        assert stream_of(peer).received == []
        assert not peer.unparsed
        await stream_of(peer).send_event(CloseConnection(1000))

    closes: list[Event] = []
    async with serving(scheme, script) as options:
        async with connect_once(**options) as emitter:
            await emitter.flush()
            if unacknowledged:
                await emitter.publish("k", "a/", "x")
    assert closes == [NORMAL]


async def test_close_is_sent_after_disconnect_when_cancelled(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.until(DISCONNECT)
        closes.append(await stream_of(peer).until(CloseConnection))

    closes: list[Event] = []
    async with serving("ws", script) as options:
        with anyio.CancelScope() as scope:
            async with connect_once(**options):
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
                await checkpoint()
    assert closes == [NORMAL]


async def test_missing_answer_to_close_does_not_delay_leaving(
    anyio_backend: object, scheme: str
) -> None:
    closed = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.answer(await peer.until(PINGREQ))
        await closed.wait()

    async with serving(scheme, script) as options:
        async with connect_once(**options, disconnect_timeout=1000) as emitter:
            await emitter.flush()
        closed.set()


@pytest.mark.parametrize(
    ("scheme", "stage"),
    [("ws", "upgrade"), ("ws", "mqtt"), ("wss", "tls"), ("wss", "upgrade"), ("wss", "mqtt")],
)
async def test_silent_peer_times_out(anyio_backend: object, scheme: str, stage: str) -> None:
    async def script(peer: Peer) -> None:
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            if stage == "mqtt":
                peer.stream = await ServerStream.accept(peer.stream)
            while True:
                await peer.stream.receive()

    trust = {"ssl_context": tls.client_context()} if scheme == "wss" else {}
    context = tls.server_context() if scheme == "wss" and stage != "tls" else None
    async with tcp_peer(script, context=context) as port:
        url = f"{scheme}://127.0.0.1:{port}"
        with pytest.raises(ConnectError, match=rf"{url}.*within 0\.3 s"):
            async with connect_once(url, connect_timeout=0.3, **trust):
                pass


async def test_peer_that_speaks_plain_mqtt(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.stream.receive()
        await peer.send(packets.CONNACK)

    async with tcp_peer(script) as port:
        with pytest.raises(ConnectError, match=r"HTTP.*try mqtt"):
            async with connect_once(f"ws://127.0.0.1:{port}"):
                pass


async def test_ws_url_to_a_tls_port(anyio_backend: object) -> None:
    async with Broker(ssl_context=tls.server_context()) as broker:
        with pytest.raises(ConnectError, match=r"try wss://|closed the connection|reset"):
            async with connect_once(f"ws://127.0.0.1:{broker.port}"):
                pass


async def test_wss_url_to_a_plain_port(anyio_backend: object) -> None:
    async with Broker() as broker:
        with pytest.raises(ConnectError, match=f"wss://127.0.0.1:{broker.port}") as caught:
            async with connect_once(f"wss://127.0.0.1:{broker.port}"):
                pass
    assert "SSL" in str(caught.value) or "TLS" in str(caught.value)


# TLS


async def test_private_authority_needs_an_ssl_context(anyio_backend: object) -> None:
    async with Broker(ssl_context=tls.server_context()) as broker:
        url = f"wss://127.0.0.1:{broker.port}"
        with pytest.raises(ConnectError, match="CERTIFICATE_VERIFY_FAILED") as caught:
            async with connect_once(url):
                pass
        assert f"{url}: " in str(caught.value)
        assert "cafile=" in str(caught.value)
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        async with connect_once(url, ssl_context=tls.client_context()) as emitter:
            await emitter.flush()


async def test_certificate_must_match_the_host(anyio_backend: object) -> None:
    async with Broker(ssl_context=tls.server_context("other.example")) as broker:
        for host in ("localhost", "127.0.0.1"):
            pattern = "CERTIFICATE_VERIFY_FAILED.*name"
            with pytest.raises(ConnectError, match=pattern):
                async with connect_once(
                    f"wss://{host}:{broker.port}", ssl_context=tls.client_context()
                ):
                    pass


@pytest.mark.parametrize(
    ("code", "pattern"),
    [
        (9, "not valid yet.*clock"),
        (10, "expired.*clock"),
        (19, r"ssl_context=ssl\.create_default_context\(cafile="),
        (62, "name"),
    ],
)
def test_certificate_error_is_explained(code: int, pattern: str) -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code = code
    explain(error)
    assert re.search(rf"certificate verify failed.*{pattern}", str(error))


@pytest.mark.parametrize(
    ("reason", "pattern"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "load_cert_chain"),
        ("WRONG_VERSION_NUMBER", "TLS"),
        ("INTERNAL_ERROR", "INTERNAL_ERROR$"),
    ],
)
async def test_tls_error_is_explained(anyio_backend: object, reason: str, pattern: str) -> None:
    class BrokenStream(MemoryStream):
        async def receive(self, max_bytes: int = 65536) -> bytes:
            raise ssl.SSLError(1, reason)

    own_end, peer = memory_stream_pair()
    own_end.__class__ = BrokenStream
    transport = StreamTransport(own_end)
    with pytest.raises(ssl.SSLError, match=pattern):
        await transport.receive()
    await transport.aclose()
    await peer.aclose()


async def test_certificate_checks_can_be_disabled(anyio_backend: object) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with Broker(ssl_context=tls.server_context("other.example")) as broker:
        async with connect_once(f"wss://127.0.0.1:{broker.port}", ssl_context=context) as emitter:
            await emitter.flush()


async def test_host_is_sent_as_sni(anyio_backend: object) -> None:
    server_names = []
    context = tls.server_context()
    context.sni_callback = lambda sock, name, context: server_names.append(name)
    async with Broker(ssl_context=context) as broker:
        trust = tls.client_context()
        async with connect_once(f"wss://localhost:{broker.port}", ssl_context=trust) as emitter:
            await emitter.flush()
    assert server_names == ["localhost"]


async def test_client_can_present_a_certificate(anyio_backend: object) -> None:
    shown: list[Any] = []
    context = tls.server_context()
    context.verify_mode = ssl.CERT_REQUIRED
    tls.authority().configure_trust(context)

    async def script(peer: Peer) -> None:
        stream = stream_of(peer).stream
        assert isinstance(stream, TLSStream)
        shown.append(stream.extra(TLSAttribute.peer_certificate))
        await peer.serve()

    async with tcp_peer(script, context=context, websocket=True) as port:
        trust = tls.client_context()
        with pytest.raises(ConnectError):
            async with connect_once(f"wss://127.0.0.1:{port}", ssl_context=trust):
                pass
        tls.certificate("client.example").configure_cert(trust)
        async with connect_once(f"wss://127.0.0.1:{port}", ssl_context=trust) as emitter:
            await emitter.flush()
    assert shown[0]["subjectAltName"] == (("DNS", "client.example"),)
