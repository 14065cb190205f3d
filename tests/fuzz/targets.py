"""The fuzz targets: each takes any bytes and raises if the library breaks a promise.

To add a target, write the function and its seeds, and add both to :data:`TARGETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from typing import Any, Final, NamedTuple

from emitter_anyio._net.options import make_options
from emitter_anyio._net.websocket import Upgrade, WebSocket
from emitter_anyio._protocol.codec import Codec
from emitter_anyio._protocol.fast_path import encode_publish
from emitter_anyio._protocol.packets import Answer, Connect, Disconnect, Packet, PubAck, SubAck
from emitter_anyio._protocol.pending import Pending, Replay
from emitter_anyio._protocol.session import Session
from emitter_anyio._protocol.wants import Wants
from emitter_anyio._values import requests as requests
from emitter_anyio._values.errors import ConnectError, EmitterError, RemoteProtocolError
from emitter_anyio._values.messages import EmitterMessage
from emitter_anyio._values.stats import decode_stats
from emitter_anyio.testing import _snappy
from tests.fuzz import seeds
from tests.support.events import unbatch
from tests.support.secrets import visible_text

LIMIT: Final = 1024
"""A packet size limit small enough for a fuzzer to reach quickly."""

KEY: Final = "aKeyOf32CharactersThatIsNotValid"
PASSWORD: Final = "a-secret-password"

MAX_CONTROL_FRAME: Final = 125 + 14
"""Bytes of the largest control frame, with its masked header."""

_BEGUN: Final = 1
_LEAVING: Final = 2


class Target(NamedTuple):
    """
    Code that must handle any bytes.

    :ivar check: a function that raises if it does not
    :ivar seeds: a function that yields initial inputs
    """

    check: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


def codec(data: bytes) -> None:
    """
    Decode bytes from a peer; the first byte is a header that configures the run.

    Its lowest bit prepends a CONNACK, the next stands for a DISCONNECT that the client sent, and
    the others are the size of the pieces, where 0 means one piece.
    """
    head, wire = data[0] if data else 0, data[1:]
    size = head >> 2 or len(wire) + 1
    places = [*range(0, len(wire), size), len(wire)]
    in_pieces = feed(head, [wire[a:b] for a, b in pairwise(places)])
    assert in_pieces == feed(head, [wire]), "the result depends on the pieces"


def feed(head: int, pieces: Iterable[bytes]) -> list[str]:
    """
    Decode pieces, and check the codec's promises.

    :return: the events, as text that can be compared
    """
    codec = Codec(Connect(), LIMIT)
    codec.connect()
    events: list[Answer] = []
    if head & _BEGUN:
        events += unbatch(codec.decode(b"\x20\2\0\0"))
    if head & _LEAVING:
        codec.encode(Disconnect())
    broken = False
    for piece in pieces:
        new = codec.decode(piece)
        while codec.turn_over:
            new += codec.decode(b"")
        assert not (broken and new), "an event follows an error"
        *before, last = new or (None,)
        assert not any(isinstance(event, RemoteProtocolError) for event in before)
        broken = broken or isinstance(last, RemoteProtocolError)
        events += unbatch(new)
        codec.take_written()
        assert buffered_bytes(codec) <= LIMIT + 5, "more than a packet is buffered"
        assert not codec._engine._reported, "an event is retained"
        assert not (broken and codec._framing._kept), "bytes of a broken connection are retained"
    return [
        f"message {event.channel!r} {event.binary!r}"
        if isinstance(event, EmitterMessage)
        else repr(event)
        for event in events
    ]


def buffered_bytes(codec: Codec) -> int:
    """Count the bytes in both directions that a codec buffers, including those in Paho."""
    client, socket = codec._engine._client, codec._engine._socket
    paho = (client._in_packet["packet"], *client._out_packet, *client._in_messages)
    own = len(codec._framing._kept) + len(socket._inbound) + len(socket._outbound)
    return own + sum(len(item) if isinstance(item, bytes | bytearray) else 1 for item in paho)


SYSTEM_TOPICS: Final = ("keygen", "keyban", "link", "me", "presence", "history", "error", "nothing")
"""The last levels of the topics of messages for :func:`answers`."""


def answers(data: bytes) -> None:
    """
    Handle answers from a broker, or from a client that imitates one: one message per line.

    The first byte of a line selects the topic; the rest is the payload.
    """
    sent: list[Packet] = []
    wants, written = Wants("emitter"), list[bytes]()
    session = Session(wants, sent.append, written.append, encode_publish)
    requested: tuple[requests.Request[Any], ...] = (
        requests.keygen(KEY, "a/", "rw", 0),
        requests.keyban(KEY, KEY, True),
        requests.link(KEY, "a/", "l", ()),
        requests.me(),
        requests.presence(KEY, "a/", status=True, changes=True),
        requests.history(KEY, "a/", last=5),
        requests.presence(KEY, "a/", status=False, changes=False),
    )
    pending: list[Pending[Any]] = [session.request(request) for request in requested]
    pending.append(session.publish_qos_1(b"k/a/", b"x", KEY, "a/"))
    pending.append(session.subscribe(KEY, KEY, "a/", Replay())[0].asked)
    session.publish(b"k/a/", b"x")
    wants.watch("a/")
    for line in data.split(b"\n"):
        where = SYSTEM_TOPICS[line[0] % len(SYSTEM_TOPICS)] if line else ""
        receive(session, EmitterMessage(f"emitter/{where}/", line[1:]))
    for packet_id in range(1, len(pending) + 1):
        receive(
            session, SubAck(packet_id, (0,)) if packet_id == len(pending) else PubAck(packet_id)
        )
    for one in pending:
        assert one.done, f"{one.operation} is acknowledged and not done"
        with suppress(EmitterError):
            one.result()
    assert not session.pending


def receive(session: Session, event: Answer) -> None:
    """Let a session receive an event, which must not end the connection."""
    for emission in session.receive(event):
        assert emission.event in (*SYSTEM_TOPICS, "message", "refused")
        assert repr(emission.value)
        assert KEY not in repr(emission.value)


def options(data: bytes) -> None:
    """Parse a URL; a newline in it is replaced by a password."""
    text = data.decode(errors="surrogateescape")
    before, line, after = text.partition("\n")
    url = f"{before}:{PASSWORD}@{after}" if line else text
    parsed, shown_text = None, ""
    try:
        parsed = make_options(url, {})
    except (TypeError, ValueError) as exc:
        shown_text = " ".join(visible_text(exc))
    if parsed is None:
        assert shown_text
    elif PASSWORD in (parsed.password or ""):
        shown_text = f"{parsed!r} {parsed.servers} {parsed.servers[0]}"
    assert PASSWORD not in shown_text


def websocket(data: bytes) -> None:
    """Unwrap frames from a peer; the first byte is the size of the pieces, 0 for one piece."""
    size, wire = data[0] if data else 0, data[1:]
    size = size or len(wire) + 1
    in_pieces = unwrap([wire[at : at + size] for at in range(0, len(wire), size)])
    assert in_pieces == unwrap([wire]), "the result depends on the pieces"


def unwrap(pieces: Iterable[bytes]) -> tuple[bytes, str]:
    """
    Unwrap frames, and check the reader's promises.

    :return: their payload, and how it ended
    """
    reader = WebSocket(LIMIT)
    payload = bytearray()
    for piece in pieces:
        ended = reader.end is not None
        new = reader.receive(piece)
        while reader.turn_over and reader.end is None:
            new += reader.receive(b"")
        assert not (ended and new), "data follows the end"
        payload += new
        assert len(reader.pong) <= MAX_CONTROL_FRAME, "more than one ping is retained"
        if reader.end is None:
            assert len(reader._connection._proto._frame_decoder.buffer) <= MAX_CONTROL_FRAME
    assert reader.end is None or isinstance(reader.end, EOFError | RemoteProtocolError)
    assert reader.end is None or (not reader.open and reader.wrap(b"x") == b"")
    return bytes(payload), repr(reader.end)


def upgrade(data: bytes) -> None:
    """Handle a server's answer to a handshake, in one piece and byte by byte."""
    outcomes = {
        perform_handshake([data]),
        perform_handshake([data[at : at + 1] for at in range(len(data))]),
    }
    assert len(outcomes) == 1, "the result depends on the pieces"


def perform_handshake(pieces: Iterable[bytes]) -> str:
    """Continue a handshake to its end; return how it ended, without the text of a refusal."""
    handshake = Upgrade("localhost", "/")
    try:
        for piece in pieces:
            if handshake.receive(piece) is not None:
                return "accepted"
        handshake.receive(b"")
    except (ConnectError, EOFError, RemoteProtocolError) as exc:
        return type(exc).__name__
    raise AssertionError("the connection ended without an error")


def stats(data: bytes) -> None:
    """Decode the figures of a node, as they are and after decompression."""
    for payload in (data, _snappy.encode(data)):
        with suppress(ValueError):
            decode_stats(payload)


TARGETS: Final = {
    "websocket": Target(websocket, seeds.frames),
    "upgrade": Target(upgrade, seeds.handshakes),
    "codec": Target(codec, seeds.conversations),
    "answers": Target(answers, seeds.answers),
    "options": Target(options, seeds.urls),
    "stats": Target(stats, seeds.snapshots),
}
