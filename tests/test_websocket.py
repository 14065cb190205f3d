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

from emitter_anyio import ConnectError, ConnectionLostError, Emitter, RemoteProtocolError
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
    """A header of the request."""
    [value] = [
        line.partition(": ")[2]
        for line in upgrade.request.decode().split("\r\n")
        if line.lower().startswith(f"{name.lower()}: ")
    ]
    return value


def accepting(upgrade: Upgrade) -> bytes:
    """The answer that the request wants."""
    return SWITCHING % generate_accept_token(header(upgrade, "Sec-WebSocket-Key").encode())


def cut(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """Cut at these places, each counted from the one before."""
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
    """What a server sees in these bytes."""
    peer = server()
    peer.receive_data(data)
    return list(peer.events())


class TestTheHandshake:
    def test_asks_for_mqtt(self) -> None:
        upgrade = Upgrade("h:8080", "/a%20b")
        assert upgrade.request.startswith(b"GET /a%20b HTTP/1.1\r\n")
        assert upgrade.request.endswith(b"\r\n\r\n")
        assert header(upgrade, "Host") == "h:8080"
        assert header(upgrade, "Sec-WebSocket-Protocol") == "mqtt"
        assert header(upgrade, "Sec-WebSocket-Version") == "13"
        assert not upgrade.refused

    def test_asks_with_a_key_of_its_own(self) -> None:
        keys = {header(Upgrade("h", "/"), "Sec-WebSocket-Key") for _ in range(10)}
        assert len(keys) == 10

    @pytest.mark.parametrize("host", ["x" * 64, "a\0b"])
    def test_with_a_host_that_is_none(self, host: str) -> None:
        with pytest.raises(OSError, match="host"):
            Upgrade(host, "/")

    @given(st.lists(st.integers(0, 60)), st.binary(max_size=20))
    def test_may_come_in_any_pieces(self, cuts: list[int], behind: bytes) -> None:
        upgrade = Upgrade("h", "/")
        got: bytes | None = None
        for chunk in cut(accepting(upgrade) + behind, cuts):
            if got is None:
                got = upgrade.receive(chunk)
            else:
                got += chunk
        assert got == behind

    def test_without_a_subprotocol_is_enough(self) -> None:
        upgrade = Upgrade("h", "/")
        assert upgrade.receive(accepting(upgrade).replace(b"-Protocol: mqtt", b"-Else: x")) == b""

    def test_lines_may_end_by_a_newline_alone(self) -> None:
        upgrade = Upgrade("h", "/")
        assert upgrade.receive(accepting(upgrade).replace(b"\r\n", b"\n") + b"x") == b"x"

    @pytest.mark.parametrize(
        ("there", "instead", "words"),
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
    def test_with_a_wrong_answer(self, there: bytes, instead: bytes, words: str) -> None:
        upgrade = Upgrade("h", "/")
        with pytest.raises(RemoteProtocolError, match=words) as caught:
            upgrade.receive(accepting(upgrade).replace(there, instead))
        assert len(str(caught.value)) < 300

    @pytest.mark.parametrize(
        ("said", "words"),
        [
            (b"\x15\x03\x01\x00\x02\x02\x16", "try wss://"),
            (b"\x15", "try wss://"),
            (packets.CONNACK, "HTTP"),
            (b"SSH-2.0-x\r\n", "HTTP"),
            (b"HTTP/2", "HTTP"),
            (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 3000, f"{MAX_HEAD_BYTES} bytes"),
        ],
    )
    def test_with_one_that_speaks_something_else(self, said: bytes, words: str) -> None:
        for size in (1, len(said)):
            upgrade = Upgrade("h", "/")
            with pytest.raises(RemoteProtocolError, match=words):
                for chunk in cut(said, [size] * len(said)):
                    assert upgrade.receive(chunk) is None

    def test_that_ends_too_early(self) -> None:
        upgrade = Upgrade("h", "/")
        assert upgrade.receive(b"HTTP/1.1 101 Sw") is None
        with pytest.raises(EOFError, match="handshake"):
            upgrade.receive(b"")


NOTHING = b"Content-Length: 0\r\n\r\n"
REFUSED = [
    ("404 X", NOTHING, r"HTTP 404 \(Not Found\).*path"),
    ("404 X", b"Content-Length: 9\r\n\r\nno page\n\n", r"Found.*'no page'"),
    ("200 X", b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", "200 .*'ab'"),
    ("403 X", b"Content-Length: 500\r\n\r\n" + b"x" * 300, "'x{200}…?'.*in front"),
    ("401 X", b"Content-Length: 1\r\n\r\n\x1b", r"401.*'\?'"),
    ("502 X", b"Content-Length: 2\r\n\r\n\xff\xff", "502.*'\ufffd\ufffd'"),
    ("299 X", NOTHING, r"HTTP 299"),
    ("100 X", b"\r\n", r"HTTP 100 \(Continue\)"),
    ("301 X", b"Location: wss://h/m?key=1\r\n" + NOTHING, "wss://h/m"),
    ("302 X", NOTHING, "redirects"),
]


class TestARefusal:
    @pytest.mark.parametrize(("status", "rest", "words"), REFUSED)
    @pytest.mark.parametrize("size", [1, 7, 10000])
    def test_is_told(self, status: str, rest: bytes, words: str, size: int) -> None:
        upgrade = Upgrade("h", "/")
        said = f"HTTP/1.1 {status}\r\n".encode() + rest
        with pytest.raises(ConnectError, match=words) as caught:
            for chunk in cut(said, [size] * len(said)):
                assert upgrade.receive(chunk) is None
        assert upgrade.refused
        assert len(str(caught.value)) < 600
        assert "key=" not in str(caught.value)

    @pytest.mark.parametrize(
        ("rest", "then"),
        [
            (b"\r\nsome", b" words"),
            (b"Content-Length: 100\r\n\r\nsome", b" words"),
            (b"Transfer-Encoding: chunked\r\n\r\na\r\nsome words\r\n", b"nonsense\r\n"),
        ],
    )
    def test_that_ends_in_the_middle_is_told_all_the_same(self, rest: bytes, then: bytes) -> None:
        upgrade = Upgrade("h", "/")
        assert upgrade.receive(b"HTTP/1.1 503 X\r\n" + rest) is None
        assert upgrade.refused
        with pytest.raises(ConnectError, match="'some words'"):
            for data in (then, b""):
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
    def test_carry_one_stream_however_they_are_cut(
        self, sent: list[BytesMessage | Ping | Pong], cuts: list[int]
    ) -> None:
        websocket = WebSocket(MAX)
        carried = [websocket.receive(chunk) for chunk in cut(frames(*sent), cuts)]
        messages = [event.data for event in sent if isinstance(event, BytesMessage)]
        assert b"".join(carried) == b"".join(messages)
        assert websocket.open
        pings = [event for event in sent if isinstance(event, Ping)]
        answers = events(websocket.pong)
        assert answers == [ping.response() for ping in pings[-1:]]

    @given(st.lists(st.binary(max_size=70000), max_size=5), st.lists(st.integers(0, 5000)))
    def test_that_are_sent_carry_what_they_should(self, sent: list[bytes], cuts: list[int]) -> None:
        websocket, peer = WebSocket(MAX), server()
        received: list[Event] = []
        for chunk in cut(b"".join(map(websocket.wrap, sent)) + websocket.close(), cuts):
            peer.receive_data(chunk)
            received += peer.events()
        assert received.pop() == NORMAL
        carried = [event.data for event in received if isinstance(event, BytesMessage)]
        assert len(carried) == len(received)
        assert b"".join(carried) == b"".join(sent)

    def test_are_masked(self) -> None:
        assert b"secret" not in b"".join(WebSocket(MAX).wrap(b"secret") for _ in range(10))

    def test_are_handed_on_before_they_are_complete(self) -> None:
        websocket = WebSocket(70000)
        data = frames(BytesMessage(bytes(60000)))
        assert [len(websocket.receive(chunk)) for chunk in cut(data, [1004, 9000])] == [
            1000,
            9000,
            50000,
        ]

    def test_may_be_as_large_as_a_packet(self) -> None:
        websocket = WebSocket(MAX)
        assert websocket.receive(frames(BytesMessage(bytes(MAX + 5)))) == bytes(MAX + 5)
        assert websocket.open

    @pytest.mark.parametrize("size", [MAX + 6, 70000, 1 << 62])
    def test_that_announce_too_much_are_refused_before_they_come(self, size: int) -> None:
        websocket = WebSocket(MAX)
        head = b"\x82\x7e" + size.to_bytes(2) if size < 65536 else b"\x82\x7f" + size.to_bytes(8)
        assert websocket.receive(frames(BytesMessage(b"before")) + head) == b"before"
        assert isinstance(websocket.end, RemoteProtocolError)
        assert f"a frame of {size} bytes, which exceeds max_message_size (1024)" in str(
            websocket.end
        )
        assert events(websocket.close()) == [CloseConnection(1009, "")]

    @pytest.mark.parametrize(
        ("wrong", "code", "words"),
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
    def test_that_break_the_rules_end_it(self, wrong: bytes, code: int, words: str) -> None:
        websocket = WebSocket(MAX)
        assert websocket.receive(frames(BytesMessage(b"before")) + wrong) == b"before"
        assert isinstance(websocket.end, RemoteProtocolError)
        assert words in str(websocket.end)
        assert not websocket.open
        assert websocket.receive(frames(BytesMessage(b"behind"))) == b""
        assert websocket.wrap(b"x") == b""
        assert events(websocket.close()) == [CloseConnection(code, "")]
        assert websocket.close() == b""

    def test_nobody_is_offered_our_way_to_look_at_them(self) -> None:
        assert not _FrameChecks(MAX).offer()

    def test_a_ping_that_waits_for_its_answer_is_forgotten_for_a_later_one(self) -> None:
        websocket = WebSocket(MAX)
        websocket.receive(frames(*(Ping(b"%d" % number) for number in range(1000))))
        while websocket.turn_over:
            websocket.receive(b"")
        assert events(websocket.pong) == [Pong(b"999")]


class TestTheEnd:
    @pytest.mark.parametrize(
        ("close", "words"),
        [
            (CloseConnection(1001, "restart"), "code 1001 (going away), 'restart'"),
            (CloseConnection(1000), "code 1000 (normal closure)"),
            (CloseConnection(4001, "a\nb\x1b"), "code 4001, 'a b?'"),
            (CloseConnection(CloseReason.NO_STATUS_RCVD), "code 1005 (no status rcvd)"),
        ],
    )
    def test_by_the_peer_is_told_and_answered(self, close: CloseConnection, words: str) -> None:
        websocket = WebSocket(MAX)
        assert websocket.receive(frames(Ping(b"x"), BytesMessage(b"last"), close)) == b"last"
        assert isinstance(websocket.end, EOFError)
        assert str(websocket.end) == f"the broker closed the WebSocket connection: {words}"
        answer = events(websocket.close())
        assert answer[0] == Pong(b"x")
        assert isinstance(answer[1], CloseConnection)
        assert answer[1].code == close.code
        assert websocket.pong == websocket.close() == b""

    def test_by_us_lets_the_peer_finish(self) -> None:
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

    def test_by_us_and_then_a_broken_rule(self) -> None:
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
    def test_in_the_handshake_are_told_from_an_answer(
        self, begin: bytes, lines: list[bytes], end: bytes, cuts: list[int]
    ) -> None:
        upgrade = Upgrade("h", "/")
        with pytest.raises((ConnectError, RemoteProtocolError, EOFError)) as caught:
            for chunk in (*cut(begin + b"".join(lines) + end, cuts), b""):
                assert upgrade.receive(chunk) is None
        assert len(str(caught.value)) < 600
        assert str(caught.value).isprintable()

    @given(st.binary(), st.lists(st.integers(0, 20)))
    def test_in_frames_end_it_or_wait_for_more(self, data: bytes, cuts: list[int]) -> None:
        websocket = WebSocket(MAX)
        carried = b"".join(map(websocket.receive, cut(data, cuts)))
        assert len(carried) <= len(data)
        assert len(websocket.pong) <= 131
        if websocket.end is not None:
            assert isinstance(websocket.end, RemoteProtocolError | EOFError)
            assert str(websocket.end).isprintable()
        websocket.close()


# The transport


def transport_over(stream: ByteStream) -> WebSocketTransport:
    return WebSocketTransport(StreamTransport(stream), WebSocket(MAX), b"")


async def test_what_came_behind_the_handshake_is_not_lost(anyio_backend: object) -> None:
    ours, peer = memory_stream_pair()
    received = frames(BytesMessage(b"early"))
    transport = WebSocketTransport(StreamTransport(ours), WebSocket(MAX), received)
    assert await transport.receive() == b"early"
    await peer.send_eof()
    assert await transport.receive() == b""
    await transport.aclose()


async def test_empty_frames_are_no_end(anyio_backend: object) -> None:
    ours, peer = memory_stream_pair()
    transport = transport_over(ours)
    await peer.send(frames(BytesMessage(b""), Pong(b"")))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(peer.send, frames(BytesMessage(b"x")))
        assert await transport.receive() == b"x"
    await transport.aclose()


async def test_half_a_frame_is_finished_before_another_begins(anyio_backend: object) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    transport = WebSocketTransport(SocketTransport(ours), WebSocket(MAX), b"")
    size = 65536
    sent = 0
    with theirs:
        # One of these is taken in part, and none behind it.
        while taken := transport.try_send(bytes(size)):
            sent += taken
        assert transport._unsent
        peer, carried, closed = server(), b"", False
        peer.receive_data(theirs.recv(1 << 20))
        # There is room now, but not for another frame in the middle of that one.
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
                        carried += event.data
                    closed = event == NORMAL
        assert carried == bytes(sent) + b"last"
        # Nothing goes behind a close, and nobody minds.
        assert transport.try_send(b"x") == 0
        assert await transport.send(b"x") == 1
        await transport.aclose()
        assert theirs.recv(1) == b""
    await transport.aclose()


async def test_a_full_socket_takes_no_frame(anyio_backend: object) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        with suppress(BlockingIOError):
            while True:
                ours.send(bytes(65536))
        transport = WebSocketTransport(SocketTransport(ours), WebSocket(MAX), b"")
        assert transport.try_send(b"x") == 0
        assert not transport._unsent
        await transport.aclose()


@pytest.mark.parametrize("end", [CloseConnection(1001, "restart"), TextMessage("hello")])
async def test_behind_the_peers_end_nothing_counts_as_sent(
    anyio_backend: object, end: Event
) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        transport = WebSocketTransport(SocketTransport(ours), WebSocket(MAX), b"")
        theirs.send(frames(BytesMessage(b"x"), end))
        assert await transport.receive() == b"x"
        assert transport.try_send(b"y") == 0
        words = "restart|text frame"
        with pytest.raises((EOFError, RemoteProtocolError), match=words):
            await transport.send(b"y")
        for _ in range(2):
            with pytest.raises((EOFError, RemoteProtocolError), match=words):
                await transport.receive()
        assert [type(event) for event in events(theirs.recv(100))] == [CloseConnection]
        await transport.aclose()


async def test_a_closed_one_may_be_closed_again(anyio_backend: object) -> None:
    ours, peer = memory_stream_pair()
    transport = transport_over(ours)
    await transport.aclose()
    await transport.send_eof()
    await transport.aclose()
    assert ours.closed
    await peer.aclose()


@pytest.mark.virtual_time
async def test_who_takes_nothing_is_not_waited_for_with_the_last_words(
    anyio_backend: object,
) -> None:
    ours, peer = memory_stream_pair(capacity=1)
    transport = transport_over(ours)
    peer.send_nowait(frames(CloseConnection(1001, "restart")))
    start = anyio.current_time()
    with pytest.raises(EOFError, match="restart"):
        await transport.receive()
    assert anyio.current_time() - start == pytest.approx(1)
    await transport.aclose()


# The client, in memory


def over(connectable: Any, **options: Any) -> Emitter:
    return connect_once("ws://broker.example/mqtt", connectable=connectable, **options)


def stream_of(peer: Peer) -> ServerStream:
    assert isinstance(peer.stream, ServerStream)
    return peer.stream


async def test_websocket_is_spoken_over_a_connectable(anyio_backend: object) -> None:
    asked: list[Event | None] = []

    async def script(peer: Peer) -> None:
        asked.append(stream_of(peer).request)
        await peer.serve()

    async with memory_peer(script, websocket=True) as connectable:
        async with over(connectable) as emitter:
            await emitter.flush()
    [request] = asked
    assert isinstance(request, Request)
    assert (request.host, request.target) == ("broker.example:8080", "/mqtt")
    assert request.subprotocols == ["mqtt"]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("ws://h:80", "h"),
        ("ws://h:443", "h:443"),
        ("ws://[::1]:81", "[::1]:81"),
        ("ws://bücher.example", "xn--bcher-kva.example:8080"),
    ],
)
async def test_the_port_is_told_unless_it_is_usual(
    anyio_backend: object, url: str, host: str
) -> None:
    asked = []

    async def script(peer: Peer) -> None:
        request = stream_of(peer).request
        assert isinstance(request, Request)
        asked.append(request.host)
        await peer.serve()

    async with memory_peer(script, websocket=True) as connectable:
        async with connect_once(url, connectable=connectable):
            pass
    assert [name.encode("idna").decode() for name in asked] == [host]


@pytest.mark.parametrize(("url", "host"), [("wss://h", "h"), ("wss://[::1]:80", "[::1]:80")])
def test_the_port_is_told_over_tls_unless_it_is_usual(url: str, host: str) -> None:
    assert host_header(make_options(url, {}).servers[0]) == host


@pytest.mark.virtual_time
async def test_a_ping_is_answered_while_nothing_else_is_sent(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        stream = stream_of(peer)
        await stream.send_event(Ping(b"before CONNACK"))
        await peer.accept()
        accepted = anyio.current_time()
        assert await stream.until(Pong) == Pong(b"before CONNACK")
        # It has waited for nothing else that leaves, such as a PINGREQ.
        assert anyio.current_time() == accepted
        for number in range(3):
            await stream.send_event(Ping(b"%d" % number))
            assert await stream.until(Pong) == Pong(b"%d" % number)
        await peer.send(packets.publish("a/", b"done"))
        await peer.answer_all()

    async with memory_peer(script, websocket=True) as connectable:
        async with over(connectable) as emitter, emitter.stream("message") as messages:
            assert (await messages.receive()).binary == b"done"
            start = anyio.current_time()
    assert anyio.current_time() == start


@pytest.mark.virtual_time
@pytest.mark.parametrize("capacity", [1, 100])
async def test_a_ping_is_answered_while_a_send_is_under_way(
    anyio_backend: object, capacity: int
) -> None:
    payload = bytes(range(250)) * 2 * capacity

    async def script(peer: Peer) -> None:
        await peer.accept()
        stream = stream_of(peer)
        await anyio.sleep(0.1)
        # A frame of the client's waits for room now, and must not be torn by the answers.
        for number in range(10):
            await stream.send_event(Ping(b"%d" % number))
        await anyio.sleep(1)
        packet = await peer.until(PUBLISH)
        assert packet.payload == payload
        # Of those that waited, the last is answered.
        assert await stream.until(Pong) == Pong(b"9")
        await peer.answer_all()

    async with memory_peer(script, websocket=True, capacity=capacity) as connectable:
        async with over(connectable) as emitter:
            await emitter.publish("k", "a/", payload)
            await anyio.sleep(0.5)
            connection = emitter._slot.connection
            assert connection is not None
            assert isinstance(connection._transport, WebSocketTransport)
            assert len(connection._transport._unsent) < len(payload) + 100
            await emitter.flush()


@pytest.mark.virtual_time
async def test_pings_tell_nothing_about_the_broker(anyio_backend: object) -> None:
    # They are a proxy's, which may go on when the broker behind it has gone.
    async def script(peer: Peer) -> None:
        await peer.accept()
        with suppress(anyio.BrokenResourceError):
            while True:
                await stream_of(peer).send_event(Ping())
                await anyio.sleep(0.1)

    async with memory_peer(script, websocket=True) as connectable:
        with pytest.raises(ConnectionLostError, match="ping timeout"):
            async with over(connectable, keepalive=2):
                await anyio.sleep_forever()


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("end", "words", "answer"),
    [
        (CloseConnection(1001, "restart"), r"1001 \(going away\), 'restart'", 1001),
        (CloseConnection(1008, "go"), r"1008 \(policy violation\), 'go'", 1008),
        (TextMessage("hello"), "a text frame", 1003),
        (BytesMessage(bytes(65536 + 6)), "exceeds max_message_size", 1009),
    ],
)
async def test_the_peers_end_is_told(
    anyio_backend: object, end: Event, words: str, answer: int
) -> None:
    answered, heard = [], anyio.Event()

    async def say(peer: Peer) -> None:
        # What is too large is not read to its end.
        with suppress(anyio.BrokenResourceError):
            await stream_of(peer).send_event(end)

    async def script(peer: Peer) -> None:
        await peer.accept()
        await peer.send(packets.publish("a/", b"last"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(say, peer)
            close = await stream_of(peer).until(CloseConnection)
        assert isinstance(close, CloseConnection)
        answered.append(close.code)
        heard.set()

    async with memory_peer(script, websocket=True) as connectable:
        emitter = over(connectable)
        got = []
        emitter.on("message", lambda message: got.append(message.binary))
        with pytest.raises(ConnectionLostError, match=words):
            async with emitter:
                await anyio.sleep_forever()
        # It has been said by then, and the peer gets to it in a turn of its own.
        await heard.wait()
    assert got == [b"last"]
    assert answered == [answer]


async def test_a_peers_end_that_comes_while_we_leave_is_none_of_ours(
    anyio_backend: object,
) -> None:
    full, left = anyio.Event(), anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.accept()
        await full.wait()
        # It reads nothing, so that neither our goodbye nor the answer to its own can leave.
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
async def test_many_packets_in_a_frame_and_a_packet_in_many_frames(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        stream = stream_of(peer)
        data = b"".join(packets.publish("a/", b"%d" % number * 50) for number in range(20))
        await stream.send(data)
        for byte in data:
            await stream.send(bytes((byte,)))
        for start in range(0, len(data), 7):
            await stream.send_event(Ping())
            # Each of these is a part of a message of WebSocket.
            part = data[start : start + 7]
            await stream.send_event(BytesMessage(part, message_finished=start + 7 >= len(data)))
        await peer.answer_all()

    async with memory_peer(script, websocket=True) as connectable:
        async with over(connectable) as emitter, emitter.stream("message") as messages:
            got = [(await messages.receive()).binary for _ in range(60)]
    assert got == [b"%d" % number * 50 for number in range(20)] * 3


@pytest.mark.virtual_time
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 101 Switch", b"HTTP/1.1 101 X\r\nUpgrade: w"])
async def test_a_peer_that_is_silent_in_the_handshake(anyio_backend: object, said: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(said)
        assert await peer.stream.receive()
        with pytest.raises(anyio.EndOfStream):
            await peer.stream.receive()

    async with memory_peer(script) as connectable:
        start = anyio.current_time()
        with pytest.raises(ConnectError, match=r"ws://.*within 10 s"):
            async with over(connectable):
                pass
        assert anyio.current_time() - start == pytest.approx(10)
        assert connectable.streams[0].closed


@pytest.mark.virtual_time
async def test_a_peer_that_is_silent_behind_the_handshake(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        assert await peer.packet() is not None
        assert await peer.packet() is None

    async with memory_peer(script, websocket=True) as connectable:
        with pytest.raises(ConnectError, match=r"ws://.*within 10 s"):
            async with over(connectable):
                pass


@pytest.mark.virtual_time
async def test_the_words_of_a_refusal_are_not_waited_for_long(anyio_backend: object) -> None:
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
            async with over(connectable):
                pass
        assert anyio.current_time() - start == pytest.approx(1)
        assert connectable.streams[0].closed


async def test_a_server_that_closes_in_the_handshake(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.stream.receive()

    async with memory_peer(script) as connectable:
        with pytest.raises(ConnectError, match=r"closed.*handshake"):
            async with over(connectable):
                pass


async def test_the_next_server_is_tried_when_one_refuses(anyio_backend: object) -> None:
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
    """A broker, and what a client needs to trust it."""
    if scheme == "ws":
        return Broker(), {}
    return Broker(ssl_context=tls.server_context()), {"ssl_context": tls.client_context()}


async def test_publishes_and_receives(anyio_backend: object, scheme: str) -> None:
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


async def test_a_flood_both_ways(anyio_backend: object, scheme: str) -> None:
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
async def test_a_path_on_which_emitter_has_something_else(
    anyio_backend: object, scheme: str, path: str
) -> None:
    broker, trust = broker_of(scheme)
    async with broker:
        with pytest.raises(ConnectError, match=r"HTTP (200|404).*/keygen"):
            async with connect_once(f"{scheme}://127.0.0.1:{broker.port}{path}", **trust):
                pass


@pytest.mark.parametrize("unsettled", [False, True])
async def test_the_close_comes_behind_disone_link(
    anyio_backend: object, scheme: str, unsettled: bool
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
            if unsettled:
                await emitter.publish("k", "a/", "x")
    assert closes == [NORMAL]


async def test_the_close_comes_behind_disconnect_when_cancelled(anyio_backend: object) -> None:
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


async def test_a_peer_that_does_not_answer_the_close_holds_nobody(
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
async def test_a_peer_that_is_silent(anyio_backend: object, scheme: str, stage: str) -> None:
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


async def test_a_peer_that_speaks_mqtt_alone(anyio_backend: object) -> None:
    async def script(peer: Peer) -> None:
        await peer.stream.receive()
        await peer.send(packets.CONNACK)

    async with tcp_peer(script) as port:
        with pytest.raises(ConnectError, match=r"HTTP.*try mqtt"):
            async with connect_once(f"ws://127.0.0.1:{port}"):
                pass


async def test_a_peer_that_speaks_tls(anyio_backend: object) -> None:
    async with Broker(ssl_context=tls.server_context()) as broker:
        with pytest.raises(ConnectError, match=r"try wss://|closed the connection|reset"):
            async with connect_once(f"ws://127.0.0.1:{broker.port}"):
                pass


async def test_one_that_speaks_no_tls(anyio_backend: object) -> None:
    async with Broker() as broker:
        with pytest.raises(ConnectError, match=f"wss://127.0.0.1:{broker.port}") as caught:
            async with connect_once(f"wss://127.0.0.1:{broker.port}"):
                pass
    assert "SSL" in str(caught.value) or "TLS" in str(caught.value)


# TLS


async def test_an_authority_of_ones_own(anyio_backend: object) -> None:
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


async def test_the_certificate_must_be_for_the_host(anyio_backend: object) -> None:
    async with Broker(ssl_context=tls.server_context("other.example")) as broker:
        for host in ("localhost", "127.0.0.1"):
            words = "CERTIFICATE_VERIFY_FAILED.*name"
            with pytest.raises(ConnectError, match=words):
                async with connect_once(
                    f"wss://{host}:{broker.port}", ssl_context=tls.client_context()
                ):
                    pass


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (9, "not valid yet.*clock"),
        (10, "expired.*clock"),
        (19, r"ssl_context=ssl\.create_default_context\(cafile="),
        (62, "name"),
    ],
)
def test_what_is_wrong_with_a_certificate_is_told(code: int, words: str) -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code = code
    explain(error)
    assert re.search(rf"certificate verify failed.*{words}", str(error))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "load_cert_chain"),
        ("WRONG_VERSION_NUMBER", "TLS"),
        ("INTERNAL_ERROR", "INTERNAL_ERROR$"),
    ],
)
async def test_what_a_tls_link_breaks_of_is_told(
    anyio_backend: object, said: str, words: str
) -> None:
    class Broken(MemoryStream):
        async def receive(self, max_bytes: int = 65536) -> bytes:
            raise ssl.SSLError(1, said)

    ours, peer = memory_stream_pair()
    ours.__class__ = Broken
    transport = StreamTransport(ours)
    with pytest.raises(ssl.SSLError, match=words):
        await transport.receive()
    await transport.aclose()
    await peer.aclose()


async def test_who_checks_nothing_is_let_in(anyio_backend: object) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with Broker(ssl_context=tls.server_context("other.example")) as broker:
        async with connect_once(f"wss://127.0.0.1:{broker.port}", ssl_context=context) as emitter:
            await emitter.flush()


async def test_the_host_is_told_to_the_server(anyio_backend: object) -> None:
    told = []
    context = tls.server_context()
    context.sni_callback = lambda sock, name, context: told.append(name)
    async with Broker(ssl_context=context) as broker:
        trust = tls.client_context()
        async with connect_once(f"wss://localhost:{broker.port}", ssl_context=trust) as emitter:
            await emitter.flush()
    assert told == ["localhost"]


async def test_a_client_may_show_a_certificate(anyio_backend: object) -> None:
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
