"""Every argument of every call is checked before anything is allocated or sent."""

from __future__ import annotations

import array
import inspect
import mmap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from enum import Enum
from functools import partial
from typing import Any, Final

import pytest

from emitter_anyio import Backoff, Emitter, MessageTooLargeError, Will, connect
from emitter_anyio._protocol.fast_path import encode_publish
from emitter_anyio._protocol.pending import Replay
from emitter_anyio._protocol.session import Session
from emitter_anyio._protocol.wants import Wants
from emitter_anyio._values import requests as requests
from emitter_anyio.testing import Broker
from tests.support.links import one_link
from tests.support.peer import DISCONNECT, PUBLISH, SUBSCRIBE, Packet, Peer, memory_peer

pytestmark = pytest.mark.anyio

KEY: Final = "k" * 32
NAN: Final = float("nan")


class Text(str, Enum):  # noqa: UP042 - StrEnum formats as what it is
    """Text whose format() is not what it is equal to."""

    KEY = KEY
    CHANNEL = "chat/"
    NAME = "a1"
    EVENT = "message"
    GROUP = "g"
    URL = "mqtt://h"
    HOST = "h"
    MATCHER = "mqtt"


class Number(int, Enum):
    FIVE = 5


class CaseInsensitive(str):
    """Text that is equal to other text."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.lower() == other.lower()

    def __hash__(self) -> int:
        return hash(self.lower())


def text_enum(text: str) -> Any:
    """Return a member of an enum that is this text."""
    make: Any = Enum
    return make("Texts", {"TEXT": text}, type=str)["TEXT"]


def generator(*_: object) -> Iterator[str]:
    yield KEY  # pragma: no cover - it never runs


async def async_generator(*_: object) -> AsyncIterator[str]:
    yield KEY  # pragma: no cover - it never runs


class CalledAsGenerator:
    def __call__(self, *_: object) -> Iterator[str]:
        yield KEY  # pragma: no cover - it never runs


def handler(*_: object) -> None:
    """Do nothing."""


KEYS: Final = (None, 5, b"k", "", "k/", "ä", generator, async_generator, CalledAsGenerator())
CHANNELS: Final = (5, b"a/", ["a/"], "", "/", "a//b/", "a b/", "ä/", "\udcff/", "x" * 70000)
FLAGS: Final = (None, 0, 1, 2, "yes", 1.0)
COUNTS: Final[tuple[object, ...]] = (-1, 2**31, 10**400, 1.5, "5", b"5", True, [])
TIMES: Final = (datetime(2024, 1, 1), NAN, 5, 10**400, "now", True, timedelta(days=1))
SECONDS: Final[tuple[object, ...]] = (-1, NAN, 10**400, "1", timedelta(seconds=1), True, [])
HANDLERS: Final = (5, "print", generator, async_generator, CalledAsGenerator(), partial(generator))
WRONG: Final[dict[str, tuple[object, ...]]] = {
    "key": KEYS,
    "secret": KEYS,
    "target": KEYS,
    "channel": CHANNELS,
    "message": (object(), {1}, {"a": b"x"}, NAN, "\udcff", b"x" * 70000),
    "ttl": COUNTS,
    "qos": (None, -1, 2, 1.0, "1", True),
    "retain": FLAGS,
    "echo": FLAGS,
    "subscribe": FLAGS,
    "banned": FLAGS,
    "resume": FLAGS,
    "mark_gaps": FLAGS,
    "changes": FLAGS[1:],
    "timeout": SECONDS,
    "name": (None, 5, b"a", "", "abc", "ä", "a/"),
    "permissions": (None, 5, b"rw", "rwz"),
    "last": COUNTS,
    "resume_limit": (None, *COUNTS),
    "concurrency": (None, 0, -1, 1.5, "5", True),
    "since": TIMES,
    "until": TIMES,
    "order": (None, 5, "random"),
    "group": (5, b"g", "", "g/h", "+"),
    "buffer": (None, 0, -1, 1.5, "5", True),
    "overflow": (None, 5, "explode"),
    "refresh": (0, *SECONDS),
    "handler": HANDLERS,
    "event": (None, 5, ["message"], "massage", ""),
    "task_status": (None, 5, "started"),
}
GOOD: Final[dict[str, Any]] = {
    "key": KEY,
    "secret": KEY,
    "target": KEY,
    "channel": "chat/",
    "message": b"x",
    "name": "a1",
    "event": "message",
    "handler": handler,
}


def signature(name: str) -> inspect.Signature:
    return inspect.signature(getattr(Emitter, name))


METHODS: Final = [
    name
    for name, value in inspect.getmembers(Emitter, callable)
    if not name.startswith("_") and len(signature(name).parameters) > 1
]
CASES: Final = [
    (method, name, value)
    for method in METHODS
    for name, parameter in signature(method).parameters.items()
    if name != "self"
    for value in WRONG[name]
    # None is a good value where it is the default.
    if value is not None or parameter.default is not None
]


async def call(emitter: Emitter, method: str, arguments: dict[str, Any]) -> object:
    """Call a method, and await or enter what it returns."""
    returned = getattr(emitter, method)(**arguments)
    if inspect.isawaitable(returned):
        return await returned
    if isinstance(returned, AbstractAsyncContextManager):
        async with returned as entered:
            return entered
    return returned


async def sent(peer: Peer) -> list[Packet]:
    """Take what the client sends between CONNECT and DISCONNECT."""
    *packets, last = await peer.rest()
    assert last.kind == DISCONNECT
    return packets


def arguments_of(method: str) -> dict[str, Any]:
    names = signature(method).parameters.items()
    return {
        name: GOOD[name]
        for name, parameter in names
        if name != "self" and (parameter.default is inspect.Parameter.empty or name == "handler")
    }


async def test_a_wrong_argument_is_rejected_before_anything_is_sent() -> None:
    """Walk over all methods, in one connection, which has to stay as it was."""

    async def script(peer: Peer) -> None:
        await peer.accept()
        assert await sent(peer) == []

    async with memory_peer(script) as way, one_link(connectable=way) as emitter:
        before = emitter.statistics()
        for method, name, value in CASES:
            arguments = {**arguments_of(method), name: value}
            try:
                await call(emitter, method, arguments)
            except (TypeError, ValueError):
                pass
            else:
                pytest.fail(f"{method}({name}={repr(value)[:99]}) was accepted")  # pragma: no cover
        assert emitter.statistics() == before


async def test_a_wrong_argument_is_rejected_after_the_same_topic_was_published_to() -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        assert [packet.kind for packet in await sent(peer)] == [PUBLISH]

    async with memory_peer(script) as way, one_link(connectable=way) as emitter:
        await emitter.publish(KEY, "chat/", b"x", 1)
        for wrong in ({"ttl": True}, {"ttl": 1.0}, {"echo": 1}, {"retain": 0}, {"qos": False}):
            with pytest.raises(TypeError, match=next(iter(wrong))):
                arguments: dict[str, Any] = {"ttl": 1, **wrong}
                await emitter.publish(KEY, "chat/", b"x", **arguments)


async def test_text_of_an_enum_is_sent_as_plain_text(broker: Broker) -> None:
    key = broker.keygen("chat/#/", "rwslp")
    text = text_enum(key)
    async with connect(broker.url) as emitter:
        async with emitter.subscribe(text, Text.CHANNEL, 0) as messages:
            for qos in (0, 1):
                await emitter.publish(text, Text.CHANNEL, Text.NAME, Number.FIVE, qos=qos)
                message = await messages.receive()
                assert (message.channel, message.binary) == ("chat/", b"a1")
        await emitter.link(text, Text.CHANNEL, Text.NAME)
        await emitter.publish_with_link(Text.NAME, b"x", qos=1)
        assert (await emitter.presence(text, Text.CHANNEL)).channel == "chat/"
        found = [one.binary async for one in emitter.history(key, Text.CHANNEL, Number.FIVE)]
        assert found == [b"a1", b"a1"]
        assert type((await emitter.me()).links["a1"]) is str
    # A cache of all clients of the process must not answer with what only looks the same.
    async with connect(broker.url) as emitter:
        async with emitter.subscribe(key, "chat/", 0) as messages:
            await emitter.publish(key, "chat/", b"x")
            assert (await messages.receive()).channel == "chat/"


async def test_text_that_equals_other_text_is_sent_as_it_is() -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        topics = [packet.topic for packet in await sent(peer)]
        assert topics == [f"{KEY}/chat/", f"{KEY}/CHAT/", f"{KEY}/ChAt/"]

    async with memory_peer(script) as way, one_link(connectable=way) as emitter:
        for channel in ("chat/", CaseInsensitive("CHAT/"), CaseInsensitive("ChAt/")):
            await emitter.publish(KEY, channel, b"x")


def test_options_are_plain() -> None:
    emitter = connect(Text.URL, matcher=Text.MATCHER, username=Text.NAME, client_id=Text.NAME)
    assert "mqtt://h:8080" in repr(emitter)
    assert "Text" not in repr(connect(host=Text.HOST))
    with pytest.raises(TypeError, match="conflicting values for 'host'"):
        connect("mqtt://h", host=CaseInsensitive("H"))


class TestBuffers:
    @pytest.mark.parametrize(
        "make",
        [
            bytearray,
            memoryview,
            lambda data: array.array("B", data),
            lambda data: memoryview(data + data)[::2][:2],
            type("Bytes", (bytes,), {"__len__": lambda self: 7}),
        ],
    )
    async def test_any_buffer_is_sent_as_it_is(
        self, broker: Broker, make: Callable[[bytes], object]
    ) -> None:
        data = b"aa"
        key = broker.keygen("a/", "rw")
        async with connect(broker.url) as emitter, emitter.subscribe(key, "a/", 0) as messages:
            await emitter.publish(key, "a/", make(data))
            assert (await messages.receive()).binary == data

    async def test_a_mapped_file_is_sent_as_it_is(self, broker: Broker) -> None:
        key = broker.keygen("a/", "rw")
        async with connect(broker.url) as emitter, emitter.subscribe(key, "a/", 0) as messages:
            with mmap.mmap(-1, 3) as mapped:
                mapped.write(b"abc")
                await emitter.publish(key, "a/", mapped)
            assert (await messages.receive()).binary == b"abc"

    async def test_a_buffer_of_objects_is_rejected(self, broker: Broker) -> None:
        ctypes = pytest.importorskip("ctypes")
        async with connect(broker.url) as emitter:
            with pytest.raises(TypeError, match="Python objects"):
                await emitter.publish(KEY, "a/", (ctypes.py_object * 2)())


class TestWills:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            (name, value)
            for name in ("key", "channel", "retain")
            for value in WRONG[name]
            if value != "x" * 70000
        ],
    )
    def test_a_wrong_value_is_rejected(self, name: str, value: object) -> None:
        values: dict[str, Any] = {"key": KEY, "channel": "a/", "message": "gone", name: value}
        with pytest.raises((TypeError, ValueError)):
            Will(**values)

    @pytest.mark.parametrize(
        ("message", "error"),
        [(object(), TypeError), (NAN, ValueError), (b"x" * 70000, MessageTooLargeError)],
    )
    def test_a_message_that_cannot_be_sent_is_rejected(
        self, message: object, error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            connect(will=Will(KEY, "a/", message), max_message_size=10**6)

    def test_values_are_plain(self) -> None:
        changing = bytearray(b"gone")
        will = Will(Text.KEY, Text.CHANNEL, changing)
        changing[:] = b"back"
        assert (type(will.key), type(will.channel), will.message) == (str, str, b"gone")
        assert Will(KEY, "a/b", "x").channel == "a/b/"

    async def test_a_key_of_a_function_that_is_too_long_is_named(self, broker: Broker) -> None:
        async def key() -> str:
            return "k" * 70000

        with pytest.raises(Exception, match="key of the will"):
            async with one_link(broker.url, will=Will(key, "a/", "gone")):
                pytest.fail("it was sent")  # pragma: no cover


def test_a_connect_that_the_broker_would_not_take_is_rejected() -> None:
    with pytest.raises(MessageTooLargeError, match=r"username.*65549.*65536"):
        connect("mqtt://h", username="x" * 65535)
    with pytest.raises(MessageTooLargeError, match="max_message_size"):
        connect("mqtt://h", will=Will(KEY, "a/", b"x" * 1000), max_message_size=1024)


@pytest.mark.parametrize("name", ["client_id", "username"])
def test_nul_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*NUL"):
        connect("mqtt://h", **{name: "a\0b"})


async def test_a_function_that_is_not_async_gives_no_key(broker: Broker) -> None:
    key: Any = lambda: KEY  # noqa: E731 - it stands for one
    async with connect(broker.url) as emitter:
        with pytest.raises(TypeError, match="must be async"):
            await emitter.publish(key, "a/", "x")


def test_decorating_a_generator_function_is_rejected() -> None:
    with pytest.raises(TypeError, match="generator function"):
        connect("mqtt://h").on("message")(generator)


def test_a_backoff_without_end_is_rejected() -> None:
    with pytest.raises(ValueError, match="maximum"):
        Backoff(maximum=10**400)


async def test_a_watch_too_large_to_send_keeps_the_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        assert await sent(peer) == []

    async with memory_peer(script) as way, one_link(connectable=way) as emitter:
        with pytest.raises(MessageTooLargeError):
            async with emitter.watch_presence(KEY, "x/" * 32760):
                pytest.fail("it was sent")  # pragma: no cover


async def test_a_key_of_a_function_too_long_to_send_keeps_the_connection() -> None:
    async def key() -> str:
        return "k" * 65530

    async def script(peer: Peer) -> None:
        await peer.accept()
        assert SUBSCRIBE not in [packet.kind for packet in await sent(peer)]

    async with memory_peer(script) as way, one_link(connectable=way) as emitter:
        for method in ("subscribe", "unsubscribe", "publish"):
            with pytest.raises(ValueError, match="65"):
                await call(emitter, method, {**arguments_of(method), "key": key})
        assert emitter.statistics().pending == 0


HOSTS: Final = {
    "mqtt://h": "it is a URL",
    "mqtt://ann:secret@h": "it is a URL",
    "ann:secret@h": "credentials",
    "h:8080": "contains a port",
    "[::1]": "brackets",
    "[::1]:8080": "brackets",
    "h ": "' '",
    " h": "' '",
    "h/chat": "'/'",
    "h\\x": "which host names cannot",
    "h?x": "'\\?'",
    "h%41": "'%'",
    "h\0": "which host names cannot",
    "h\u3000": "which host names cannot",
    "h\udcff": "encoded as UTF-8",
    "::1::2": "not an IPv6 address",
    "": "empty",
    "fe80::1%a b": "network interface",
    "/tmp/\0": "Unix socket",
    "/tmp/\ud800": "Unix socket",
}


@pytest.mark.parametrize(("host", "words"), HOSTS.items(), ids=map(repr, HOSTS))
def test_a_mistake_in_a_host_is_named(host: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"host.*{words}") as caught:
        connect(host=host)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "host", ["h", "h.example.", "a_b", "127.0.0.1", "::1", "fe80::1%eth0", "é"]
)
def test_a_good_host_is_taken(host: str) -> None:
    connect(host=host)


URLS: Final = {
    "mqtt://a b": "' '",
    "mqtt://h\n": "control character",
    "mqtt://h\\x": "which host names cannot",
    "mqtt://h%41": "'%'",
    "mqtt://ann:%ff@h": "percent-encoding of the password",
    "mqtt://%ff:secret@h": "percent-encoding of the user name",
    "unix:///%ff": "percent-encoding of the path",
    "unix:///a%00": "Unix socket",
    "ws://h/\udcff": "encoded as UTF-8",
    "mqtt://ann:se#cret@h": "quote it",
    "mqtt://ann:se/cret@h": "quote it",
    "mqtt://ann:se?cret@h": "quote it",
    "mqtt://ann:se[cret@h": "quote it",
    "mqtt://ann:12/34@h": "quote it",
    "ws://ann:#secret@h": "quote it",
}


@pytest.mark.parametrize(("url", "words"), URLS.items(), ids=map(repr, URLS))
def test_a_mistake_in_a_url_is_named(url: str, words: str) -> None:
    for options in ({}, {"servers": [url]}):
        with pytest.raises(ValueError, match=words) as caught:
            connect(*(() if options else (url,)), **options)
        error: BaseException | None = caught.value
        while error is not None:
            assert not any(part in repr(error) for part in ("secret", "se#", "cret@", "34@"))
            error = None if error.__suppress_context__ else error.__context__


def test_the_zone_of_an_address_in_a_url_is_quoted() -> None:
    url = "mqtt://[fe80::1%25eth0]:8080"
    assert url in repr(connect(url))
    assert url in repr(connect(host="fe80::1%eth0", secure=False))


@pytest.mark.parametrize("qos", [0, 1])
async def test_a_publish_that_cannot_be_encoded_leaves_nothing_pending(
    qos: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        assert await sent(peer) == []

    def encode(*_: object) -> bytes:
        raise MemoryError

    async with memory_peer(script) as way, one_link(connectable=way) as emitter:
        with monkeypatch.context() as patch:
            patch.setattr(emitter._slot.session, "_encode_publish", encode)
            with pytest.raises(MemoryError):
                await call(emitter, "publish", {**arguments_of("publish"), "qos": qos})
        assert emitter.statistics().pending == 0


def test_a_request_that_cannot_be_encoded_leaves_nothing_pending() -> None:
    def send(packet: object) -> None:
        raise MemoryError

    wants = Wants("emitter")
    session = Session(wants, send, send, encode_publish)
    freed: list[None] = []
    session.call_when_free(lambda: freed.append(None))
    for ask in (
        lambda: session.request(requests.me()),
        lambda: session.unsubscribe(KEY, "a/"),
        lambda: session.subscribe(KEY, KEY, "a/", Replay()),
    ):
        with pytest.raises(MemoryError):
            ask()
    assert (session.pending, wants.is_subscribed("a/"), freed) == (0, False, [None])
