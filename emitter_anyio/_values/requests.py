"""Control requests and their typed replies.

A request is a PUBLISH to ``emitter/<operation>/``. The broker replies on the same topic, with the
packet id as ``req``, before it acknowledges the request. A reply is JSON that any client with a
sufficiently wide key could have forged, so every field is checked.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Generic, Literal, NoReturn, TypeVar

from .channels import ChannelKey, format_options, format_topic
from .messages import StoredMessage
from .text import make_printable

T = TypeVar("T")

_ID_EPOCH: Final = 1514764800
"""The Unix time at which the seconds in message ids begin, 2018-01-01."""


class InvalidReplyError(ValueError):
    """A reply that the broker would not send."""


@dataclass(frozen=True, slots=True)
class Link:
    """
    A short name of a channel on one connection.

    :ivar name: one or two letters or digits
    :ivar channel: the channel, with the options of the link
    """

    name: str
    channel: str


class _ReadOnlyDict(dict[str, str]):
    """A read-only ``dict``, because a mapping proxy cannot be pickled or copied."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def _refuse_to_change(*args: object, **keywords: object) -> NoReturn:
    raise TypeError("links is read-only; copy it with dict(me.links)")


for _name in (
    *("__setitem__", "__delitem__", "__ior__", "update", "setdefault"),
    *("pop", "popitem", "clear"),
):
    setattr(_ReadOnlyDict, _name, _refuse_to_change)


@dataclass(frozen=True, slots=True)
class Me:
    """
    The broker's information about the current connection.

    :ivar id: the id of the connection, which changes with each reconnection
    :ivar links: the channels by link name; read-only, because handlers and callers share it
    """

    id: str
    links: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Member:
    """
    A connection that is subscribed to a channel.

    :ivar id: the id of the connection
    :ivar username: the user name of the connection, or ``None``
    :ivar confirmed: whether the broker has reported this member on the client's current connection.
        After a reconnection, :attr:`PresenceFeed.members` keeps earlier members as unconfirmed
        until the broker reports them again or as gone
    """

    id: str
    username: str | None = None
    confirmed: bool = True


@dataclass(frozen=True, slots=True)
class PresenceEvent:
    """
    A change of a channel's members.

    :ivar time: the broker's time, to the second
    :ivar event: ``"subscribe"`` or ``"unsubscribe"``; ``"status"`` in a :class:`PresenceStatus`
    :ivar channel: the channel, which might be below the watched channel
    :ivar who: the member that changed; all current members in a :class:`PresenceStatus`
    """

    time: datetime
    event: Literal["status", "subscribe", "unsubscribe"]
    channel: str
    who: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class PresenceStatus(PresenceEvent):
    """The members that a message to a channel would have reached at a certain time."""


@dataclass(frozen=True, slots=True, repr=False)
class Request(Generic[T]):
    """
    A control request to the broker.

    :ivar operation: its name, which determines its topic ``emitter/<operation>/`` and its event
    :ivar body: the JSON to send, or an empty payload
    :ivar parse: makes the value from a successful reply, or raises :exc:`InvalidReplyError`
    :ivar key: the key, for hints
    :ivar channel: the channel, for errors
    :ivar emits: whether a successful reply is also emitted as an event
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
    """Create a key from the secret key, or a private channel from an extend key."""

    def parse(answer: Mapping[str, Any]) -> ChannelKey:
        return ChannelKey(_get_text(answer, "key"), _get_text(answer, "channel"))

    body = {"key": key, "channel": channel, "type": permissions, "ttl": ttl}
    return Request("keygen", _encode(body), parse, key, channel)


def keyban(secret: str, target: str, banned: bool) -> Request[bool]:
    """Ban a key, or lift a ban."""

    def parse(answer: Mapping[str, Any]) -> bool:
        if not isinstance(now := answer.get("banned"), bool):
            raise InvalidReplyError("'banned' is not a boolean")
        return now

    body = {"secret": secret, "target": target, "banned": banned}
    return Request("keyban", _encode(body), parse, secret)


def link(
    key: str, channel: str, name: str, options: Iterable[tuple[str, int | None]]
) -> Request[Link]:
    """Create a link. The broker checks the key only when the link is used."""

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
    """Request the id and the links of the connection."""

    def parse(answer: Mapping[str, Any]) -> Me:
        links = answer.get("links", {})
        if not isinstance(links, dict) or not all(isinstance(v, str) for v in links.values()):
            raise InvalidReplyError("'links' is not an object of strings")
        return Me(_get_text(answer, "id"), _ReadOnlyDict(links))

    return Request("me", b"", parse)


def presence(
    key: str, channel: str, *, status: bool, changes: bool | None
) -> Request[PresenceStatus | None]:
    """
    Request the members of a channel, and turn the feed of their changes on or off.

    :param status: whether to request the members
    :param changes: whether to turn the feed on or off; ``None`` leaves it as it is. The broker
        would treat ``false`` as the end of the feed, so ``None`` is not sent
    """

    def parse(answer: Mapping[str, Any]) -> PresenceStatus | None:
        if not status:
            return None
        who = answer.get("who")
        if not isinstance(who, list):
            raise InvalidReplyError("'who' is not an array")
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
    Parse a presence change, which the broker sends without a ``req``.

    :raises InvalidReplyError: if a field is invalid
    """
    event = answer.get("event")
    if event not in ("subscribe", "unsubscribe"):
        raise InvalidReplyError("'event' is neither 'subscribe' nor 'unsubscribe'")
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
    Request the newest stored messages; the value lists the oldest of them first.

    The broker's replies are sorted only by second, and reversed within a second, so the messages
    are sorted again by id.

    :param last: the maximum number of messages
    :param since: the first second, in Unix time
    :param until: the last second, in Unix time
    :param before: the id of a message; only older messages are requested
    """

    def parse(answer: Mapping[str, Any]) -> list[StoredMessage]:
        found = answer.get("messages")
        if not isinstance(found, list):
            raise InvalidReplyError("'messages' is not an array")
        return sorted(map(_parse_stored, found), key=lambda message: message.id[4:16], reverse=True)

    # The key must be part of the channel, because the broker ignores a "key" field here.
    topic = format_topic(key, channel, (("last", last), ("from", since), ("until", until)))
    body = {"channel": topic}
    if before is not None:
        body["startFromID"] = base64.b64encode(before).decode()
    return Request("history", _encode(body), parse, key, channel, False)


def parse_object(binary: bytes) -> Mapping[str, Any]:
    """
    Parse a JSON object.

    :raises InvalidReplyError: if it is anything else
    """
    try:
        value = json.loads(binary)
    except (ValueError, RecursionError) as exc:
        raise InvalidReplyError("not JSON") from exc
    if not isinstance(value, dict):
        raise InvalidReplyError("not a JSON object")
    return value


def parse_refusal(answer: Mapping[str, Any]) -> tuple[int, str] | None:
    """
    Return the status and message of a refusal, or ``None`` for a successful reply.

    A successful history reply has no status.

    :raises InvalidReplyError: if the status or the message has the wrong type
    """
    status = answer.get("status", 200)
    if not isinstance(status, int) or isinstance(status, bool):
        raise InvalidReplyError("'status' is not an integer")
    return None if status == 200 else (status, make_printable(_get_text(answer, "message")))


def _encode(body: Mapping[str, object]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def _get_text(answer: Mapping[str, Any], name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str):
        raise InvalidReplyError(f"{name!r} is not a string")
    return value


def _get_time(answer: Mapping[str, Any], name: str) -> datetime:
    value = answer.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidReplyError(f"{name!r} is not an integer")
    try:
        return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError) as exc:
        raise InvalidReplyError(f"{name!r} is out of range") from exc


def _parse_member(who: object) -> Member:
    if not isinstance(who, dict):
        raise InvalidReplyError("a member is not an object")
    username = who.get("username")
    if username is not None and not isinstance(username, str):
        raise InvalidReplyError("'username' is not a string")
    return Member(_get_text(who, "id"), username)


def _parse_stored(found: object) -> StoredMessage:
    if not isinstance(found, dict):
        raise InvalidReplyError("a stored message is not an object")
    id = _get_text(found, "id")
    try:
        number = base64.b64decode(id, validate=True)
        # The broker omits an empty payload.
        binary = base64.b64decode(found.get("payload") or "", validate=True)
    except (TypeError, ValueError) as exc:
        raise InvalidReplyError("a stored message is not valid base64") from exc
    if len(number) < 16:
        raise InvalidReplyError("the id of a stored message is too short")
    seconds = 0xFFFFFFFF - int.from_bytes(number[4:8], "big") + _ID_EPOCH
    return StoredMessage(
        number, datetime.fromtimestamp(seconds, UTC), _get_text(found, "channel"), binary
    )
