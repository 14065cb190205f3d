"""Control requests and their typed answers.

A request is a ``PUBLISH`` to ``emitter/<operation>/``; the broker answers on the same topic, before
it acknowledges, with the packet id as ``req``. What comes is JSON that anybody with a wide enough
key could have forged, so every field is checked before it becomes a value.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Generic, Literal, NoReturn, TypeVar

from .channels import format_options, format_topic
from .messages import StoredMessage
from .text import make_printable

T = TypeVar("T")

_ID_EPOCH: Final = 1514764800
"""Message ids count their seconds from 2018-01-01."""


class InvalidReplyError(ValueError):
    """What came is not what the broker would send."""


@dataclass(frozen=True, slots=True, repr=False)
class ChannelKey:
    """
    A key and the channel that it opens.

    :ivar key: the key; it is not shown in the ``repr``
    :ivar channel: the target as the broker sees it; for a private channel it ends with the
        connection's id
    """

    key: str
    channel: str

    def __repr__(self) -> str:
        return f"ChannelKey(key=…, channel={self.channel!r})"


@dataclass(frozen=True, slots=True)
class Link:
    """
    A short name for a channel on this connection.

    :ivar name: one or two letters or digits
    :ivar channel: the channel with the options that the link was made with
    """

    name: str
    channel: str


class _ReadOnlyDict(dict[str, str]):
    """A dict that cannot be changed; a mapping proxy could not be pickled or copied."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def _refuse_to_change(*args: object, **keywords: object) -> NoReturn:
    raise TypeError("links cannot be changed; copy them with dict(me.links)")


for _name in (
    *("__setitem__", "__delitem__", "__ior__", "update", "setdefault"),
    *("pop", "popitem", "clear"),
):
    setattr(_ReadOnlyDict, _name, _refuse_to_change)


@dataclass(frozen=True, slots=True)
class Me:
    """
    What the broker knows of this connection.

    :ivar id: the connection's id, new for each link
    :ivar links: channels by the names of their links; read-only, because handlers and callers
        share it
    """

    id: str
    links: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Member:
    """
    A connection that is subscribed to a channel.

    :ivar id: the connection's id
    :ivar username: the user name that it connected with, if any
    :ivar confirmed: whether the broker has named it since the client's connection was opened. In
        :attr:`PresenceFeed.members`, those of an earlier connection stay without it until the
        broker says something of them
    """

    id: str
    username: str | None = None
    confirmed: bool = True


@dataclass(frozen=True, slots=True)
class PresenceEvent:
    """
    Something that happened to the members of a channel.

    :ivar time: the broker's time, to the second
    :ivar event: ``"subscribe"`` or ``"unsubscribe"``; ``"status"`` in a :class:`PresenceStatus`
    :ivar channel: the channel, which may be one below the watched one
    :ivar who: who it is about: one member, or all who are there in a :class:`PresenceStatus`
    """

    time: datetime
    event: Literal["status", "subscribe", "unsubscribe"]
    channel: str
    who: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class PresenceStatus(PresenceEvent):
    """Whom a message to a channel would have reached at one time."""


@dataclass(frozen=True, slots=True, repr=False)
class Request(Generic[T]):
    """
    A question to the broker.

    :ivar operation: its name, which is its topic ``emitter/<operation>/`` and its event
    :ivar body: the JSON to send, or nothing
    :ivar parse: makes the value of a good answer; raises :exc:`InvalidReplyError`
    :ivar key: the key in question, for hints
    :ivar channel: the channel in question, for errors
    :ivar emits: whether a good answer is an event, too
    """

    operation: str
    body: bytes
    parse: Callable[[Mapping[str, Any]], T]
    key: str | None = None
    channel: str | None = None
    emits: bool = True

    @property
    def topic(self) -> str:
        return f"emitter/{self.operation}/"


def keygen(key: str, channel: str, permissions: str, ttl: int) -> Request[ChannelKey]:
    """Ask for a key: ``key`` is the master secret, or an extend key for a private channel."""

    def parse(answer: Mapping[str, Any]) -> ChannelKey:
        return ChannelKey(_get_text(answer, "key"), _get_text(answer, "channel"))

    body = {"key": key, "channel": channel, "type": permissions, "ttl": ttl}
    return Request("keygen", _encode(body), parse, key, channel)


def keyban(secret: str, target: str, banned: bool) -> Request[bool]:
    """Ask to ban a key, or to take that back."""

    def parse(answer: Mapping[str, Any]) -> bool:
        if not isinstance(now := answer.get("banned"), bool):
            raise InvalidReplyError("banned is no bool")
        return now

    body = {"secret": secret, "target": target, "banned": banned}
    return Request("keyban", _encode(body), parse, secret)


def link(
    key: str, channel: str, name: str, options: Iterable[tuple[str, int | None]]
) -> Request[Link]:
    """Ask for a link; the broker checks the key only when the link is used."""

    def parse(answer: Mapping[str, Any]) -> Link:
        return Link(_get_text(answer, "name"), _get_text(answer, "channel"))

    body = {
        "name": name,
        "key": key,
        "channel": format_options(channel, options),
        "subscribe": False,
    }
    return Request("link", _encode(body), parse, key, channel)


def me() -> Request[Me]:
    """Ask who we are."""

    def parse(answer: Mapping[str, Any]) -> Me:
        links = answer.get("links", {})
        if not isinstance(links, dict) or not all(isinstance(v, str) for v in links.values()):
            raise InvalidReplyError("links is not an object of channels")
        return Me(_get_text(answer, "id"), _ReadOnlyDict(links))

    return Request("me", b"", parse)


def presence(
    key: str, channel: str, *, status: bool, changes: bool | None
) -> Request[PresenceStatus | None]:
    """
    Ask who is there (``status``), and turn the feed of changes on or off.

    A ``changes`` of ``None`` is left out: the broker takes an explicit ``false`` as the end of the
    feed.
    """

    def parse(answer: Mapping[str, Any]) -> PresenceStatus | None:
        if not status:
            return None
        who = answer.get("who")
        if not isinstance(who, list):
            raise InvalidReplyError("who is not an array")
        return PresenceStatus(
            _get_time(answer, "time"),
            "status",
            _get_text(answer, "channel"),
            tuple(map(_parse_member, who)),
        )

    body: dict[str, object] = {"key": key, "channel": channel, "status": status}
    if changes is not None:
        body["changes"] = changes
    return Request("presence", _encode(body), parse, key, channel)


def parse_presence_event(answer: Mapping[str, Any]) -> PresenceEvent:
    """
    Read a change of presence, which comes without having been asked for each time.

    :raises InvalidReplyError: if it is none
    """
    event = answer.get("event")
    if event not in ("subscribe", "unsubscribe"):
        raise InvalidReplyError("event is neither subscribe nor unsubscribe")
    who = (_parse_member(answer.get("who")),)
    return PresenceEvent(_get_time(answer, "time"), event, _get_text(answer, "channel"), who)


def history(
    key: str,
    channel: str,
    *,
    last: int,
    since: int | None = None,
    until: int | None = None,
    before: bytes | None = None,
) -> Request[list[StoredMessage]]:
    """
    Ask for the newest of the stored messages, the oldest of them first in the answer.

    The broker sorts by the second only and puts the newest first within one; the ids know better.

    :param before: the id of a message: only those older than it
    """

    def parse(answer: Mapping[str, Any]) -> list[StoredMessage]:
        found = answer.get("messages")
        if not isinstance(found, list):
            raise InvalidReplyError("messages is not an array")
        return sorted(map(_parse_stored, found), key=lambda message: message.id[4:16], reverse=True)

    # The key stands inside the channel here; the broker passes over a field of its own for it.
    topic = format_topic(key, channel, (("last", last), ("from", since), ("until", until)))
    body = {"channel": topic}
    if before is not None:
        body["startFromID"] = base64.b64encode(before).decode()
    return Request("history", _encode(body), parse, key, channel, False)


def parse_object(binary: bytes) -> Mapping[str, Any]:
    """
    Read a JSON object.

    :raises InvalidReplyError: if it is something else
    """
    try:
        value = json.loads(binary)
    except (ValueError, RecursionError) as exc:
        raise InvalidReplyError("no JSON") from exc
    if not isinstance(value, dict):
        raise InvalidReplyError("no JSON object")
    return value


def parse_refusal(answer: Mapping[str, Any]) -> tuple[int, str] | None:
    """
    Tell the status and message of an answer that says no, or ``None`` of one that says yes.

    A history answer has no status when all is well.

    :raises InvalidReplyError: if status or message are not of their kind
    """
    status = answer.get("status", 200)
    if not isinstance(status, int) or isinstance(status, bool):
        raise InvalidReplyError("status is no whole number")
    return None if status == 200 else (status, make_printable(_get_text(answer, "message")))


def _encode(body: Mapping[str, object]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def _get_text(answer: Mapping[str, Any], name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str):
        raise InvalidReplyError(f"{name} is no string")
    return value


def _get_time(answer: Mapping[str, Any], name: str) -> datetime:
    value = answer.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidReplyError(f"{name} is no whole number")
    try:
        return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError) as exc:
        raise InvalidReplyError(f"{name} is no time") from exc


def _parse_member(who: object) -> Member:
    if not isinstance(who, dict):
        raise InvalidReplyError("a member is no object")
    username = who.get("username")
    if username is not None and not isinstance(username, str):
        raise InvalidReplyError("username is no string")
    return Member(_get_text(who, "id"), username)


def _parse_stored(found: object) -> StoredMessage:
    if not isinstance(found, dict):
        raise InvalidReplyError("a stored message is no object")
    id = _get_text(found, "id")
    try:
        number = base64.b64decode(id, validate=True)
        # The broker, written in Go, leaves out an empty payload.
        binary = base64.b64decode(found.get("payload") or "", validate=True)
    except (TypeError, ValueError) as exc:
        raise InvalidReplyError("a stored message is no base64") from exc
    if len(number) < 16:
        raise InvalidReplyError("the id of a stored message is too short")
    seconds = 0xFFFFFFFF - int.from_bytes(number[4:8], "big") + _ID_EPOCH
    return StoredMessage(
        number, datetime.fromtimestamp(seconds, UTC), _get_text(found, "channel"), binary
    )
