"""The client checks every argument of every method before it allocates or sends anything."""

from __future__ import annotations

import array
import inspect
import mmap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from enum import Enum
from functools import partial
from typing import Any, Final, cast

import pytest

from emitter_anyio import Backoff, ChannelKey, Emitter, MessageTooLargeError, Will, connect
from emitter_anyio._protocol.fast_path import encode_publish
from emitter_anyio._protocol.pending import Replay
from emitter_anyio._protocol.session import Session
from emitter_anyio._protocol.wants import Wants
from emitter_anyio._values import requests as requests
from emitter_anyio.testing import Broker
from tests.support.connections import connect_once
from tests.support.peer import DISCONNECT, PUBLISH, SUBSCRIBE, Packet, Peer, memory_peer

pytestmark = pytest.mark.anyio

KEY: Final = "k" * 32
NAN: Final = float("nan")


class Text(str, Enum):  # noqa: UP042 - StrEnum would format as its value
    """Strings whose ``format()`` differs from their value."""

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
    """A string that equals different strings."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.lower() == other.lower()

    def __hash__(self) -> int:
        return hash(self.lower())


def text_enum(text: str) -> Any:
    """Return an enum member with this string value."""
    create: Any = Enum
    return create("Texts", {"TEXT": text}, type=str)["TEXT"]


def generator(*_: object) -> Iterator[str]:
    yield KEY  # pragma: no cover - never runs


async def async_generator(*_: object) -> AsyncIterator[str]:
    yield KEY  # pragma: no cover - never runs


async def coroutine(*_: object) -> str:
    return KEY  # pragma: no cover - never runs


class CallableGenerator:
    def __call__(self, *_: object) -> Iterator[str]:
        yield KEY  # pragma: no cover - never runs


def handler(*_: object) -> None:
    """Do nothing."""


KEYS: Final = (
    *(None, 5, b"k", "", "k/", "ä", generator, async_generator, CallableGenerator()),
    *(ChannelKey(key, "chat/") for key in cast("list[str]", [None, 5, b"k", "", "k/"])),
)
CHANNELS: Final = (5, b"a/", ["a/"], "", "/", "a//b/", "a b/", "ä/", "\udcff/", "x" * 70000)
FLAGS: Final = (None, 0, 1, 2, "yes", 1.0)
COUNTS: Final[tuple[object, ...]] = (-1, 2**31, 10**400, 1.5, "5", b"5", True, [])
TIMES: Final = (datetime(2024, 1, 1), NAN, 5, 10**400, "now", True, timedelta(days=1))
SECONDS: Final[tuple[object, ...]] = (-1, NAN, 10**400, "1", timedelta(seconds=1), True, [])
HANDLERS: Final = (5, "print", generator, async_generator, CallableGenerator(), partial(generator))
INVALID: Final[dict[str, tuple[object, ...]]] = {
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
    "after": (5, b"1.", ["1."], "", "x", "1.", "1.AAAA", "2.AAAA", "now "),
    "concurrency": (None, 0, -1, 1.5, "5", True),
    "since": TIMES,
    "until": TIMES,
    "order": (None, 5, "random"),
    "group_key": (5, b"k", "", "k/", generator, async_generator),
    "count": (0, *COUNTS),
    "idle": (0, *SECONDS),
    "group": (5, b"g", "", "g/h", "+"),
    "decode": (5, "json", generator, async_generator, coroutine, partial(coroutine)),
    "buffer": (None, 0, -1, 1.5, "5", True),
    "overflow": (None, 5, "explode"),
    "refresh": (0, *SECONDS),
    "handler": HANDLERS,
    "event": (None, 5, ["message"], "massage", ""),
    "task_status": (None, 5, "started"),
}
VALID: Final[dict[str, Any]] = {
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
    for value in INVALID[name]
    # None is valid where it is the default.
    if value is not None or parameter.default is not None
]


async def call(emitter: Emitter, method: str, arguments: dict[str, Any]) -> object:
    """Call a method, and await or enter its result."""
    returned = getattr(emitter, method)(**arguments)
    if inspect.isawaitable(returned):
        return await returned
    if isinstance(returned, AbstractAsyncContextManager):
        async with returned as entered:
            return entered
    return returned


async def received_packets(peer: Peer) -> list[Packet]:
    """Return what the client sends between CONNECT and DISCONNECT."""
    *packets, last = await peer.rest()
    assert last.kind == DISCONNECT
    return packets


def arguments_of(method: str) -> dict[str, Any]:
    names = signature(method).parameters.items()
    return {
        name: VALID[name]
        for name, parameter in names
        if name != "self" and (parameter.default is inspect.Parameter.empty or name == "handler")
    }


async def test_invalid_argument_is_rejected_before_anything_is_sent() -> None:
    """Check all methods over one connection, whose state must not change."""

    async def script(peer: Peer) -> None:
        await peer.accept()
        assert await received_packets(peer) == []

    async with memory_peer(script) as connectable, connect_once(connectable=connectable) as emitter:
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


async def test_invalid_argument_is_rejected_despite_cached_topic() -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        assert [packet.kind for packet in await received_packets(peer)] == [PUBLISH]

    async with memory_peer(script) as connectable, connect_once(connectable=connectable) as emitter:
        await emitter.publish(KEY, "chat/", b"x", 1)
        for invalid in ({"ttl": True}, {"ttl": 1.0}, {"echo": 1}, {"retain": 0}, {"qos": False}):
            with pytest.raises(TypeError, match=next(iter(invalid))):
                arguments: dict[str, Any] = {"ttl": 1, **invalid}
                await emitter.publish(KEY, "chat/", b"x", **arguments)


async def test_enum_member_is_sent_as_its_value(broker: Broker) -> None:
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
        found = [
            message.binary async for message in emitter.history(key, Text.CHANNEL, Number.FIVE)
        ]
        assert found == [b"a1", b"a1"]
        assert type((await emitter.me()).links["a1"]) is str
    # A cache shared by all clients must not return an enum member for an equal string.
    async with connect(broker.url) as emitter:
        async with emitter.subscribe(key, "chat/", 0) as messages:
            await emitter.publish(key, "chat/", b"x")
            assert (await messages.receive()).channel == "chat/"


async def test_str_subclass_that_equals_other_channel_is_sent_unchanged() -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        topics = [packet.topic for packet in await received_packets(peer)]
        assert topics == [f"{KEY}/chat/", f"{KEY}/CHAT/", f"{KEY}/ChAt/"]

    async with memory_peer(script) as connectable, connect_once(connectable=connectable) as emitter:
        for channel in ("chat/", CaseInsensitive("CHAT/"), CaseInsensitive("ChAt/")):
            await emitter.publish(KEY, channel, b"x")


def test_connect_converts_str_subclasses_to_str() -> None:
    matcher: Any = Text.MATCHER
    emitter = connect(Text.URL, matcher=matcher, username=Text.NAME, client_id=Text.NAME)
    assert "mqtt://h:8080" in repr(emitter)
    assert "Text" not in repr(connect(host=Text.HOST))
    with pytest.raises(TypeError, match="conflicting values for 'host'"):
        connect("mqtt://h", host=CaseInsensitive("H"))


class TestBuffers:
    @pytest.mark.parametrize(
        "create",
        [
            bytearray,
            memoryview,
            lambda data: array.array("B", data),
            lambda data: memoryview(data + data)[::2][:2],
            type("Bytes", (bytes,), {"__len__": lambda self: 7}),
        ],
    )
    async def test_bytes_like_object_is_sent_unchanged(
        self, broker: Broker, create: Callable[[bytes], object]
    ) -> None:
        data = b"aa"
        key = broker.keygen("a/", "rw")
        async with connect(broker.url) as emitter, emitter.subscribe(key, "a/", 0) as messages:
            await emitter.publish(key, "a/", create(data))
            assert (await messages.receive()).binary == data

    async def test_mmap_is_sent_unchanged(self, broker: Broker) -> None:
        key = broker.keygen("a/", "rw")
        async with connect(broker.url) as emitter, emitter.subscribe(key, "a/", 0) as messages:
            with mmap.mmap(-1, 3) as mapped:
                mapped.write(b"abc")
                await emitter.publish(key, "a/", mapped)
            assert (await messages.receive()).binary == b"abc"

    async def test_buffer_of_python_objects_is_rejected(self, broker: Broker) -> None:
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
            for value in INVALID[name]
            if value != "x" * 70000
        ],
    )
    def test_invalid_value_is_rejected(self, name: str, value: object) -> None:
        values: dict[str, Any] = {"key": KEY, "channel": "a/", "message": "gone", name: value}
        with pytest.raises((TypeError, ValueError)):
            Will(**values)

    @pytest.mark.parametrize(
        ("message", "error"),
        [(object(), TypeError), (NAN, ValueError), (b"x" * 70000, MessageTooLargeError)],
    )
    def test_message_that_cannot_be_sent_is_rejected(
        self, message: object, error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            connect(will=Will(KEY, "a/", message), max_message_size=10**6)

    def test_values_are_copied_to_plain_types(self) -> None:
        buffer = bytearray(b"gone")
        will = Will(Text.KEY, Text.CHANNEL, buffer)
        buffer[:] = b"back"
        assert (type(will.key), type(will.channel), will.message) == (str, str, b"gone")
        assert Will(KEY, "a/b", "x").channel == "a/b/"
        assert Will(ChannelKey(KEY, "b/"), "a/", "x") == Will(KEY, "a/", "x")

    async def test_too_long_key_from_key_function_raises(self, broker: Broker) -> None:
        async def key() -> str:
            return "k" * 70000

        with pytest.raises(Exception, match="key for the will"):
            async with connect_once(broker.url, will=Will(key, "a/", "gone")):
                pytest.fail("the will was sent")  # pragma: no cover


def test_too_large_connect_packet_is_rejected() -> None:
    with pytest.raises(MessageTooLargeError, match=r"username.*65549.*65536"):
        connect("mqtt://h", username="x" * 65535)
    with pytest.raises(MessageTooLargeError, match="max_message_size"):
        connect("mqtt://h", will=Will(KEY, "a/", b"x" * 1000), max_message_size=1024)


@pytest.mark.parametrize("name", ["client_id", "username"])
def test_option_with_nul_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*NUL"):
        connect({name: "a\0b"}, host="h")


async def test_key_function_that_is_not_async_is_rejected(broker: Broker) -> None:
    key: Any = lambda: KEY  # noqa: E731 - a lambda is what is tested
    async with connect(broker.url) as emitter:
        with pytest.raises(TypeError, match="async def"):
            await emitter.publish(key, "a/", "x")


def test_on_as_decorator_rejects_generator_function() -> None:
    with pytest.raises(TypeError, match="generator function"):
        connect("mqtt://h").on("message")(generator)


def test_backoff_with_too_large_maximum_is_rejected() -> None:
    with pytest.raises(ValueError, match="maximum"):
        Backoff(maximum=10**400)


async def test_too_large_watch_presence_keeps_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        assert await received_packets(peer) == []

    async with memory_peer(script) as connectable, connect_once(connectable=connectable) as emitter:
        with pytest.raises(MessageTooLargeError):
            async with emitter.watch_presence(KEY, "x/" * 32760):
                pytest.fail("the request was sent")  # pragma: no cover


async def test_too_long_key_from_key_function_keeps_connection() -> None:
    async def key() -> str:
        return "k" * 65530

    async def script(peer: Peer) -> None:
        await peer.accept()
        assert SUBSCRIBE not in [packet.kind for packet in await received_packets(peer)]

    async with memory_peer(script) as connectable, connect_once(connectable=connectable) as emitter:
        for method in ("subscribe", "unsubscribe", "publish"):
            with pytest.raises(ValueError, match="65"):
                await call(emitter, method, {**arguments_of(method), "key": key})
        assert emitter.statistics().pending == 0


INVALID_HOSTS: Final = {
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


@pytest.mark.parametrize(("host", "words"), INVALID_HOSTS.items(), ids=map(repr, INVALID_HOSTS))
def test_invalid_host_error_names_mistake(host: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"host.*{words}") as caught:
        connect(host=host)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "host", ["h", "h.example.", "a_b", "127.0.0.1", "::1", "fe80::1%eth0", "é"]
)
def test_valid_host_is_accepted(host: str) -> None:
    connect(host=host)


INVALID_URLS: Final = {
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
    "ws://ann:?secret@h": "quote it",
    "ws://ann:12?34@h": "quote it",
}


@pytest.mark.parametrize(("url", "words"), INVALID_URLS.items(), ids=map(repr, INVALID_URLS))
def test_invalid_url_error_names_mistake_without_password(url: str, words: str) -> None:
    for options in (url, {"servers": [url]}):
        with pytest.raises(ValueError, match=words) as caught:
            connect(options)
        error: BaseException | None = caught.value
        while error is not None:
            assert not any(part in repr(error) for part in ("secret", "se#", "cret@", "34@"))
            error = None if error.__suppress_context__ else error.__context__


def test_ipv6_zone_in_url_is_quoted() -> None:
    url = "mqtt://[fe80::1%25eth0]:8080"
    assert url in repr(connect(url))
    assert url in repr(connect(host="fe80::1%eth0", secure=False))


@pytest.mark.parametrize("qos", [0, 1])
async def test_publish_that_cannot_be_encoded_is_not_pending(
    qos: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(peer: Peer) -> None:
        await peer.accept()
        assert await received_packets(peer) == []

    def encode(*_: object) -> bytes:
        raise MemoryError

    async with memory_peer(script) as connectable, connect_once(connectable=connectable) as emitter:
        with monkeypatch.context() as patch:
            patch.setattr(emitter._slot.session, "_encode_publish", encode)
            with pytest.raises(MemoryError):
                await call(emitter, "publish", {**arguments_of("publish"), "qos": qos})
        assert emitter.statistics().pending == 0


def test_request_that_cannot_be_encoded_is_not_pending() -> None:
    def send(packet: object) -> None:
        raise MemoryError

    wants = Wants("emitter")
    session = Session(wants, send, send, encode_publish)
    freed: list[None] = []
    session.call_when_free(lambda: freed.append(None))
    for request in (
        lambda: session.request(requests.me()),
        lambda: session.unsubscribe(KEY, "a/"),
        lambda: session.subscribe(KEY, KEY, "a/", Replay()),
    ):
        with pytest.raises(MemoryError):
            request()
    assert (session.pending, wants.is_subscribed("a/"), freed) == (0, False, [None])
