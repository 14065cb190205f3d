"""What is fuzzed: each target takes any bytes, and raises what nobody has promised.

To add one, write the function, give it some seeds, and name both in :data:`TARGETS`.
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
from tests.fuzz import seeds
from tests.support.events import unbatch
from tests.support.secrets import visible_text

LIMIT: Final = 1024
"""So small that a fuzzer soon finds what happens at it."""

KEY: Final = "aKeyOf32CharactersThatNobodyMade"
PASSWORD: Final = "a-secret-password"

MAX_CONTROL_FRAME: Final = 125 + 14
"""A control frame has so many bytes at most, its head with a mask included."""

_BEGUN: Final = 1
_LEAVING: Final = 2


class Target(NamedTuple):
    """
    Something that has to cope with any bytes.

    :ivar check: raises if it does not
    :ivar seeds: gives inputs to begin with
    """

    check: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


def codec(data: bytes) -> None:
    """
    Bytes from a peer: the first says how to feed the rest.

    Its lowest bit stands for a CONNACK in front, the next one for a DISCONNECT that we have sent,
    and the others for the size of the pieces, where 0 is all at once.
    """
    head, wire = data[0] if data else 0, data[1:]
    size = head >> 2 or len(wire) + 1
    places = [*range(0, len(wire), size), len(wire)]
    in_pieces = feed(head, [wire[a:b] for a, b in pairwise(places)])
    assert in_pieces == feed(head, [wire]), "what comes out depends on how it is cut"


def feed(head: int, pieces: Iterable[bytes]) -> list[str]:
    """
    Let a codec decode pieces, and hold it to its promises.

    :return: the events, written so that they can be compared
    """
    made = Codec(Connect(), LIMIT)
    made.connect()
    events: list[Answer] = []
    if head & _BEGUN:
        events += unbatch(made.decode(b"\x20\2\0\0"))
    if head & _LEAVING:
        made.encode(Disconnect())
    broken = False
    for piece in pieces:
        more = made.decode(piece)
        while made.turn_over:
            more += made.decode(b"")
        assert not (broken and more), "something comes out behind an error"
        *before, last = more or (None,)
        assert not any(isinstance(event, RemoteProtocolError) for event in before)
        broken = broken or isinstance(last, RemoteProtocolError)
        events += unbatch(more)
        made.take_written()
        assert held(made) <= LIMIT + 5, "more is held than a packet"
        assert not made._engine._reported, "an event is kept for later"
        assert not (broken and made._framing._kept), "what a broken connection has sent is kept"
    return [
        f"message {event.channel!r} {event.binary!r}"
        if isinstance(event, EmitterMessage)
        else repr(event)
        for event in events
    ]


def held(made: Codec) -> int:
    """How many bytes from the peer and to it a codec holds: its own, and what Paho has."""
    client, socket = made._engine._client, made._engine._socket
    paho = (client._in_packet["packet"], *client._out_packet, *client._in_messages)
    own = len(made._framing._kept) + len(socket._inbound) + len(socket._outbound)
    return own + sum(len(item) if isinstance(item, bytes | bytearray) else 1 for item in paho)


ASKED: Final = ("keygen", "keyban", "link", "me", "presence", "history", "error", "nothing")
"""What the messages for :func:`answers` may be on, below ``emitter/``."""


def answers(data: bytes) -> None:
    """
    Answers from a broker, or from somebody who plays one: a message for each line.

    The first byte of a line says what it is on; the rest is the payload.
    """
    sent: list[Packet] = []
    wants, written = Wants("emitter"), list[bytes]()
    session = Session(wants, sent.append, written.append, encode_publish)
    asked: tuple[requests.Request[Any], ...] = (
        requests.keygen(KEY, "a/", "rw", 0),
        requests.keyban(KEY, KEY, True),
        requests.link(KEY, "a/", "l", ()),
        requests.me(),
        requests.presence(KEY, "a/", status=True, changes=True),
        requests.history(KEY, "a/", last=5),
        requests.presence(KEY, "a/", status=False, changes=False),
    )
    pending: list[Pending[Any]] = [session.request(request) for request in asked]
    pending.append(session.publish_qos_1(b"k/a/", b"x", KEY, "a/"))
    pending.append(session.subscribe(KEY, KEY, "a/", Replay())[0].asked)
    session.publish(b"k/a/", b"x")
    wants.watch("a/")
    for line in data.split(b"\n"):
        where = ASKED[line[0] % len(ASKED)] if line else ""
        tell(session, EmitterMessage(f"emitter/{where}/", line[1:]))
    for packet_id in range(1, len(pending) + 1):
        tell(session, SubAck(packet_id, (0,)) if packet_id == len(pending) else PubAck(packet_id))
    for one in pending:
        assert one.done, f"{one.operation} is acknowledged and not done"
        with suppress(EmitterError):
            one.result()
    assert not session.pending


def tell(session: Session, event: Answer) -> None:
    """Let a session hear something; no message is a reason to end the link."""
    for emission in session.receive(event):
        assert emission.event in (*ASKED, "message")
        assert repr(emission.value)
        assert KEY not in repr(emission.value)


def options(data: bytes) -> None:
    """A URL, with a password put in where a line ends, if one does."""
    text = data.decode(errors="surrogateescape")
    before, line, after = text.partition("\n")
    url = f"{before}:{PASSWORD}@{after}" if line else text
    made, words = None, ""
    try:
        made = make_options(url, {})
    except (TypeError, ValueError) as exc:
        words = " ".join(visible_text(exc))
    if made is None:
        assert words
    elif PASSWORD in (made.password or ""):
        words = f"{made!r} {made.servers} {made.servers[0]}"
    assert PASSWORD not in words


def websocket(data: bytes) -> None:
    """Frames from a peer: the first byte says in how large pieces, where 0 is all at once."""
    size, wire = data[0] if data else 0, data[1:]
    size = size or len(wire) + 1
    in_pieces = unwrap([wire[at : at + size] for at in range(0, len(wire), size)])
    assert in_pieces == unwrap([wire]), "what comes out depends on how it is cut"


def unwrap(pieces: Iterable[bytes]) -> tuple[bytes, str]:
    """
    Take frames apart, and hold the reader to its promises.

    :return: what they carried, and how it ended
    """
    made = WebSocket(LIMIT)
    carried = bytearray()
    for piece in pieces:
        ended = made.end is not None
        more = made.receive(piece)
        while made.turn_over and made.end is None:
            more += made.receive(b"")
        assert not (ended and more), "something comes out behind the end"
        carried += more
        assert len(made.pong) <= MAX_CONTROL_FRAME, "more than one ping is kept"
        if made.end is None:
            assert len(made._connection._proto._frame_decoder.buffer) <= MAX_CONTROL_FRAME
    assert made.end is None or isinstance(made.end, EOFError | RemoteProtocolError)
    assert made.end is None or (not made.open and made.wrap(b"x") == b"")
    return bytes(carried), repr(made.end)


def upgrade(data: bytes) -> None:
    """The answer to a handshake, at once and byte for byte."""
    shaken = {shake([data]), shake([data[at : at + 1] for at in range(len(data))])}
    assert len(shaken) == 1, "what comes out depends on how it is cut"


def shake(pieces: Iterable[bytes]) -> str:
    """Go on with a handshake until it is over; tells by what, but for a refusal's cut words."""
    made = Upgrade("localhost", "/")
    try:
        for piece in pieces:
            if made.receive(piece) is not None:
                return "accepted"
        made.receive(b"")
    except (ConnectError, EOFError, RemoteProtocolError) as exc:
        return type(exc).__name__
    raise AssertionError("the link has ended, and nobody says so")


TARGETS: Final = {
    "websocket": Target(websocket, seeds.frames),
    "upgrade": Target(upgrade, seeds.handshakes),
    "codec": Target(codec, seeds.conversations),
    "answers": Target(answers, seeds.answers),
    "options": Target(options, seeds.urls),
}
