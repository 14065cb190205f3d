"""MQTT, HTTP and WebSocket on one port, without I/O."""

from __future__ import annotations

import struct
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from wsproto.frame_protocol import Opcode

from emitter_anyio.testing._packets import ConnAck, Connect, PingReq, PingResp
from emitter_anyio.testing._websocket import _TextAsBytes
from emitter_anyio.testing._wire import MAX_HEAD_BYTES, Wire

HEADERS = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "keep-alive, Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
CONNECT, PING = Connect("me").encode(), PingReq().encode()


def request(
    target: str = "/",
    *,
    method: str = "GET",
    headers: dict[str, str] = HEADERS,
    newline: str = "\r\n",
) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {headers[name]}" for name in headers)]
    return newline.join([*lines, newline]).encode("latin-1")


def frame(
    opcode: int, data: bytes, *, last: bool = True, mask: bytes | None = b"\1\2\3\4"
) -> bytes:
    """Encode a client's frame, independently of wsproto."""
    head = bytes((last << 7 | opcode,))
    masked = 128 * (mask is not None)
    if len(data) < 126:
        head += bytes((masked | len(data),))
    elif len(data) < 65536:
        head += bytes((masked | 126,)) + struct.pack("!H", len(data))
    else:
        head += bytes((masked | 127,)) + struct.pack("!Q", len(data))
    if mask is not None:
        head += mask
        data = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
    return head + data


def take(*pieces: bytes) -> tuple[bytes, bytes, bool]:
    """Return the MQTT bytes, the replies, and whether the connection is closed."""
    wire, carried, answer = Wire(), b"", b""
    for piece in pieces:
        if not wire.closed:
            carried += wire.receive(piece)
            answer += wire.answer()
    assert wire.answer() == b""
    return carried, answer, wire.closed


def upgraded() -> Wire:
    wire = Wire()
    assert wire.receive(request()) == b""
    assert wire.answer().startswith(b"HTTP/1.1 101 ")
    return wire


def response(head: bytes) -> tuple[int, bytes]:
    """Return the status and the body of the response to a request that is not an upgrade."""
    carried, answer, closed = take(head)
    assert carried == b""
    assert closed
    headers, _, body = answer.partition(b"\r\n\r\n")
    assert b"Connection: close" in headers
    if not head.startswith(b"HEAD "):
        assert f"Content-Length: {len(body)}".encode() in headers
    return int(headers.split()[1]), body


class TestPlain:
    @pytest.mark.parametrize("data", [CONNECT, b"\x10", b"get /", b"\xff", b"\0"])
    def test_bytes_without_a_capital_letter_are_mqtt(self, data: bytes) -> None:
        assert take(data, request()) == (data + request(), b"", False)

    def test_packets_are_sent_unchanged(self) -> None:
        wire = Wire()
        wire.receive(CONNECT)
        assert wire.wrap(ConnAck().encode()) == ConnAck().encode()


class TestHTTP:
    @pytest.mark.parametrize("target", ["/health", "/health?from=me"])
    @pytest.mark.parametrize("headers", [{}, HEADERS])
    def test_health(self, target: str, headers: dict[str, str]) -> None:
        assert response(request(target, headers=headers)) == (200, b"OK\n")
        assert response(request(target, method="POST", headers=headers)) == (200, b"OK\n")
        assert response(request(target, method="HEAD", headers=headers)) == (200, b"")

    @pytest.mark.parametrize("target", ["/keygen", "/presence", "/metrics", "/debug", "/debug/x"])
    def test_web_pages_are_not_found(self, target: str) -> None:
        status, body = response(request(target))
        assert status == 404
        assert b"publish requests to emitter/..." in body

    @pytest.mark.parametrize(
        "head",
        [
            pytest.param(request(headers={}), id="no upgrade"),
            pytest.param(request("/health/", headers={}), id="below health"),
            pytest.param(request(headers={**HEADERS, "Upgrade": "h2c"}), id="another upgrade"),
            pytest.param(request(headers={**HEADERS, "Connection": "close"}), id="connection"),
            pytest.param(request(headers={**HEADERS, "Sec-WebSocket-Version": "8"}), id="version"),
            pytest.param(request(headers={**HEADERS, "Sec-WebSocket-Key": "YWJj"}), id="short key"),
            pytest.param(request(headers={**HEADERS, "Sec-WebSocket-Key": "\xfc"}), id="no base64"),
            pytest.param(
                request(headers={name: HEADERS[name] for name in HEADERS if name != "Host"}),
                id="no host",
            ),
            pytest.param(b"GET /\r\n\r\n", id="HTTP/0.9"),
            pytest.param(b"PRI * HTTP/2.0\r\n\r\n", id="HTTP/2"),
            pytest.param(b"GET / HTTP/1.1\r\nno colon\r\n\r\n", id="no header"),
            pytest.param(b"GET / HTTP/1.1\r\n: no name\r\n\r\n", id="no name"),
            pytest.param(b"GET / HTTP/1.1\r\nA: 1\r\n folded: 2\r\n\r\n", id="folded"),
            pytest.param(b"A\n\n", id="nonsense"),
        ],
    )
    def test_invalid_requests_get_status_400(self, head: bytes) -> None:
        assert response(head)[0] == 400

    def test_upgrade_requires_get(self) -> None:
        assert response(request(method="POST"))[0] == 405

    def test_too_long_head_gets_status_431(self) -> None:
        assert response(b"GET / HTTP/1.1\r\nA: " + bytes(MAX_HEAD_BYTES))[0] == 431
        fits = b"GET /health HTTP/1.1\r\nA: "
        fits += b"a" * (MAX_HEAD_BYTES - len(fits) - 4) + b"\r\n\r\n"
        assert response(fits)[0] == 200
        assert response(fits.replace(b"A:", b"A: "))[0] == 431

    def test_missing_wsproto_gets_status_501(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "emitter_anyio.testing._websocket", None)
        status, body = response(request())
        assert status == 501
        assert body == b"WebSocket requires wsproto: pip install '.[websocket]' in a checkout\n"
        assert response(request("/health")) == (200, b"OK\n")


class TestUpgrade:
    def test_upgrade_response(self) -> None:
        # The key is the example of RFC 6455, section 1.3.
        for target in ("/", "/any/path?at=all", "/healthy"):
            carried, answer, closed = take(request(target))
            assert (carried, closed) == (b"", False)
            assert answer.split(b"\r\n") == [
                b"HTTP/1.1 101 Switching Protocols",
                b"Upgrade: websocket",
                b"Connection: Upgrade",
                b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
                b"",
                b"",
            ]

    @pytest.mark.parametrize(
        ("wanted", "chosen"),
        [
            ("mqtt", "mqtt"),
            ("mqttv3.1", "mqttv3.1"),
            ("mqttv3", "mqttv3"),
            ("mqtt, mqttv3.1", "mqttv3.1"),
            ("mqttv3,mqtt", "mqttv3"),
            ("soap, mqtt", "mqtt"),
            ("soap", None),
        ],
    )
    def test_subprotocols(self, wanted: str, chosen: str | None) -> None:
        answer = take(request(headers={**HEADERS, "Sec-WebSocket-Protocol": wanted}))[1]
        lines = [line for line in answer.splitlines() if line.startswith(b"Sec-WebSocket-Protocol")]
        assert lines == [f"Sec-WebSocket-Protocol: {chosen}".encode()] * (chosen is not None)

    def test_headers_are_case_insensitive_and_may_repeat(self) -> None:
        head = request(headers={name.upper(): HEADERS[name] for name in HEADERS}, newline="\n")
        head = head.replace(b"keep-alive, Upgrade", b"keep-alive\nconnection:UPGRADE ")
        assert take(head)[1].startswith(b"HTTP/1.1 101 ")

    def test_frames_may_follow_the_request_immediately(self) -> None:
        carried, answer, closed = take(request() + frame(2, CONNECT) + frame(9, b"hey"))
        assert (carried, closed) == (CONNECT, False)
        assert answer.endswith(b"\r\n\r\n\x8a\x03hey")


class TestWebSocket:
    @pytest.mark.parametrize("opcode", [1, 2])
    @pytest.mark.parametrize("size", [0, 2, 125, 126, 65535, 65536])
    def test_payload_of_a_frame(self, opcode: int, size: int) -> None:
        # The bytes are not UTF-8. Emitter accepts them in text frames, too.
        data = (PING * size)[:size]
        assert upgraded().receive(frame(opcode, data)) == data

    @pytest.mark.parametrize("opcode", [1, 2])
    def test_fragments_with_control_frames_between(self, opcode: int) -> None:
        wire = upgraded()
        data = frame(opcode, CONNECT[:3], last=False) + frame(9, b"\xc0")
        data += frame(0, CONNECT[3:] + PING[:1], last=False) + frame(10, b"") + frame(0, PING[1:])
        assert wire.receive(data + frame(3 - opcode, PING)) == CONNECT + PING + PING
        assert wire.answer() == b"\x8a\x01\xc0"

    def test_each_packet_has_its_own_frame(self) -> None:
        assert upgraded().wrap(PingResp().encode()) == b"\x82\x02\xd0\x00"

    @pytest.mark.parametrize(
        ("reason", "said"),
        [(b"", b"\x88\x00"), (struct.pack("!H", 1000) + b"bye", b"\x88\x05\x03\xe8bye")],
    )
    def test_close(self, reason: bytes, said: bytes) -> None:
        wire = upgraded()
        assert wire.receive(frame(2, PING) + frame(8, reason) + frame(2, PING)) == PING
        assert wire.answer() == said
        assert wire.closed
        assert wire.wrap(PING) == b""

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(frame(2, PING, mask=None), id="not masked"),
            pytest.param(frame(2 | 64, PING), id="a reserved bit"),
            pytest.param(frame(3, PING), id="an unknown opcode"),
            pytest.param(frame(0, PING), id="nothing to continue"),
            pytest.param(frame(2, b"", last=False) + frame(2, b""), id="not continued"),
            pytest.param(frame(9, b"", last=False), id="a ping in fragments"),
            pytest.param(frame(8, b"\0"), id="a close with half a code"),
        ],
    )
    def test_protocol_violation_closes_the_websocket(self, data: bytes) -> None:
        wire = upgraded()
        assert wire.receive(frame(2, CONNECT) + data + frame(2, PING)) == CONNECT
        assert wire.answer()[:1] == b"\x88"
        assert wire.answer()[2:4] != struct.pack("!H", 1000)
        assert wire.closed
        assert wire.wrap(PING) == b""

    def test_private_extension_is_not_offered(self) -> None:
        assert not _TextAsBytes().offer()


def cuts(data: bytes) -> st.SearchStrategy[list[bytes]]:
    return st.lists(st.integers(0, len(data)), max_size=12).map(
        lambda at: [
            data[start:end]
            for start, end in zip([0, *sorted(at)], [*sorted(at), len(data)], strict=True)
            if start < end
        ]
    )


frames = st.builds(
    frame,
    st.one_of(st.sampled_from([0, 1, 2, 8, 9, 10]), st.integers(0, 15)),
    st.binary(max_size=200),
    last=st.booleans(),
    mask=st.one_of(st.binary(min_size=4, max_size=4), st.none()),
)
valid_frames = st.builds(
    frame,
    st.sampled_from([int(Opcode.TEXT), int(Opcode.BINARY), int(Opcode.PING), int(Opcode.PONG)]),
    st.binary(max_size=125),
    mask=st.binary(min_size=4, max_size=4),
)
heads = st.one_of(
    st.just(request()),
    st.builds(
        lambda head, at, junk: head[:at] + junk + head[at:],
        st.just(request()),
        st.integers(0, len(request())),
        st.binary(max_size=5),
    ),
)
streams = st.one_of(
    st.binary(),
    st.tuples(st.just(b"G"), st.binary()).map(b"".join),
    st.tuples(heads, st.lists(frames).map(b"".join)).map(b"".join),
    st.tuples(st.just(request()), st.lists(valid_frames).map(b"".join), st.binary()).map(b"".join),
)


class TestAnyBytes:
    @given(st.data())
    def test_any_chunks_give_the_same_result(self, data: st.DataObject) -> None:
        stream = data.draw(streams)
        pieces = data.draw(cuts(stream))
        assert b"".join(pieces) == stream
        assert take(*pieces) == take(stream)

    @given(st.lists(valid_frames))
    @example([frame(1, b"\xff"), frame(9, b"\xff")])
    def test_valid_frames_keep_the_websocket_open(self, good: list[bytes]) -> None:
        carried, _, closed = take(request() + b"".join(good))
        assert not closed
        data = [each for each in good if each[0] & 15 in (Opcode.TEXT, Opcode.BINARY)]
        assert len(carried) == sum(len(each) - 6 for each in data)

    @given(st.binary(max_size=70000))
    def test_payload_is_unchanged(self, payload: bytes) -> None:
        assert take(request(), frame(2, payload))[0] == payload
        assert take(request(), frame(1, payload))[0] == payload
