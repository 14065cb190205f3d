"""Channels, keys and options: checks before sending, and their encoding as a topic.

A topic sent to the broker has the form ``key/channel/?option=value&option=value``. A topic received
from it is the channel alone. The rules are those of Emitter's ``security/channel.go``, verified
against a running broker.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final, TypeAlias

from .checks import check_function, check_text, is_number
from .errors import InvalidChannelError


@dataclass(frozen=True, slots=True, repr=False)
class ChannelKey:
    """
    A key and its target channel, which is accepted wherever a key is.

    The ``str`` and the ``repr`` do not show the key. A method to which it is passed uses only the
    key, and does not compare the channel with its own.

    :ivar key: the key
    :ivar channel: the target as the broker reports it; that of a private channel ends with the id
        of the connection
    """

    key: str
    channel: str

    def __repr__(self) -> str:
        return f"ChannelKey(key=…, channel={self.channel!r})"


KeyFunction: TypeAlias = Callable[[], Awaitable[str | ChannelKey]]
"""An ``async`` function that returns a key; it is called again if the key is refused."""

Key: TypeAlias = str | ChannelKey | KeyFunction
"""What methods accept as a key."""

KeySource: TypeAlias = str | KeyFunction
"""A checked key, or a function that returns one."""

PLACEHOLDER_KEY: Final = "k" * 32
"""A placeholder with the length of a real key, for checking sizes before a function returns one."""

MAX_KEY_LEVELS: Final = 23
"""The maximum number of levels in a key's target, because the broker stores one bit per level."""

_FIRST_SECOND: Final = 1514764800
_LAST_SECOND: Final = 3029529600
"""The first and last valid Unix time; the broker ignores ``from`` and ``until`` outside them."""

_MAX_TOPIC_BYTES: Final = 65535

_LEVEL = re.compile(r"[$\-.0-9:A-Z\[\\\]^_`a-z]+\Z", re.ASCII)
_INVALID_IN_KEY = re.compile(r"[^!-~]|[/?#+]")


def levels(channel: str) -> list[str]:
    """Split a checked channel, which ends with a slash, into its levels."""
    return channel[:-1].split("/")


def is_level(text: str) -> bool:
    """Return whether a text is one level that the broker accepts, and no wildcard."""
    return _LEVEL.match(text) is not None


def check_channel(channel: str, *, wildcards: bool = False) -> str:
    """
    Check a channel and add a trailing slash if it is missing.

    :param channel: levels of ``$ - . 0-9 : A-Z [ \\ ] ^ _ ` a-z``, separated by slashes
    :param wildcards: whether levels may be ``+``, and the last one ``#``
    :return: the channel with a trailing slash
    :raises InvalidChannelError: if the broker would not accept it
    """
    text = check_text("channel", channel, " such as 'chat/' (or from Channel.format())")
    return _check_channel("channel", text, wildcards)


@lru_cache(maxsize=1024)
def _check_channel(name: str, channel: str, wildcards: bool) -> str:
    if not channel.strip("/"):
        raise InvalidChannelError(f"invalid {name}: it is empty")
    whole = channel if channel.endswith("/") else channel + "/"
    if len(whole) > _MAX_TOPIC_BYTES:
        raise InvalidChannelError(
            f"invalid {name}: it has {len(whole)} characters, but MQTT allows at most "
            f"{_MAX_TOPIC_BYTES} bytes"
        )
    parts = levels(whole)
    for number, level in enumerate(parts, 1):
        if not level:
            raise InvalidChannelError(
                f"invalid {name} {channel!r}: it has an empty level; "
                "use one slash between two levels, and none at the start"
            )
        if level in ("+", "#"):
            if not wildcards:
                raise InvalidChannelError(
                    f"invalid {name} {channel!r}: the wildcard {level!r} is not allowed here; "
                    "name one channel"
                )
            if level == "#" and number < len(parts):
                raise InvalidChannelError(
                    f"invalid {name} {channel!r}: the wildcard '#' must be the last level"
                )
        elif not _LEVEL.match(level):
            bad = next(c for c in level if not _LEVEL.match(c))
            raise InvalidChannelError(
                f"invalid {name} {channel!r}: Emitter does not accept the character {bad!r}; "
                "use letters, digits and $ - . : [ \\ ] ^ _ `"
            )
    return whole


def check_group(group: str) -> str:
    """
    Check the name of a share group.

    :raises InvalidChannelError: if it is not a single level without wildcards
    """
    name = _check_channel("group", check_text("group", group), wildcards=False)[:-1]
    if "/" in name:
        raise InvalidChannelError(f"invalid group {name!r}: it must not contain a slash")
    return name


def share(group: str | None, channel: str) -> str:
    """Return the filter for a checked channel, with its group if there is one."""
    return channel if group is None else f"$share/{group}/{channel}"


def unshare(filter: str) -> tuple[str | None, str]:
    """Split a filter into its group, or ``None``, and its channel."""
    if filter.startswith("$share/") and filter.count("/") > 2:
        group, _, channel = filter[len("$share/") :].partition("/")
        return group, channel
    return None, filter


def check_target(channel: str) -> str:
    """
    Check the target of a key: a channel of at most 23 levels, which may have wildcards.

    :return: the target with a trailing slash
    :raises InvalidChannelError: if the broker would not create a key for it
    """
    target = check_channel(channel, wildcards=True)
    depth = len(levels(target.removesuffix("#/")))
    if depth > MAX_KEY_LEVELS:
        raise InvalidChannelError(
            f"invalid key target {target!r}: it has {depth} levels, but a key covers at most "
            f"{MAX_KEY_LEVELS}; use a parent channel, such as 'a/b/#/'"
        )
    return target


def check_key_source(key: Key) -> KeySource:
    """
    Check a key, or a function that returns one.

    :return: the key as a plain ``str``, or the function
    :raises TypeError: if it is neither, or a function that cannot be hashed
    :raises ValueError: if the key contains an invalid character
    """
    if isinstance(key, str | ChannelKey) or not callable(key):
        return check_key(key)
    # The function must be hashable, because it is used as a dict key.
    hash(check_function("key", key))
    return key


def check_key(key: str | ChannelKey) -> str:
    """
    Check that a key can be part of a topic. Only the broker can check its permissions.

    :return: the key as a plain ``str``
    :raises TypeError: if it is neither a ``str`` nor a :class:`ChannelKey` that contains one
    :raises ValueError: if it is empty, or contains a character that would change the meaning of the
        topic; the message does not contain the key
    """
    if isinstance(key, ChannelKey):
        key = key.key
    key = check_text("key", key, ", a ChannelKey, or an async function that returns either")
    if not key:
        raise ValueError("invalid key: it is empty; create one with keygen()")
    if bad := _INVALID_IN_KEY.search(key):
        raise ValueError(
            f"invalid key: it contains {bad[0]!r} at position {bad.start()}; "
            "keys consist of letters, digits, '-' and '_'"
        )
    return key


def unix_seconds(name: str, value: datetime | float | None) -> int | None:
    """
    Convert a point in time into whole Unix seconds.

    :param value: an aware ``datetime``, or Unix seconds
    :raises TypeError: if it is neither
    :raises ValueError: if it is a naive ``datetime``, or outside the range that the broker accepts
    """
    if value is None:
        return None
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise ValueError(
                f"{name} must be an aware datetime, not a naive one; "
                "set its tzinfo, for example to timezone.utc"
            )
        seconds = value.timestamp()
    elif is_number(value):
        seconds = value
    else:
        raise TypeError(f"{name} must be a datetime or Unix seconds, not {type(value).__name__}")
    if not _FIRST_SECOND <= seconds <= _LAST_SECOND:
        raise ValueError(
            f"{name} must be from {_FIRST_SECOND} (2018) to {_LAST_SECOND} (2066) in Unix seconds, "
            f"not {seconds}: the broker ignores times outside this range"
        )
    return int(seconds)


def format_topic(key: str, channel: str, options: Iterable[tuple[str, int | None]] = ()) -> str:
    """
    Build a topic from checked parts.

    :param options: names and values in the order of the topic; options that are ``None`` are left
        out
    :raises InvalidChannelError: if the topic is longer than MQTT allows
    """
    topic = f"{key}/{format_options(channel, options)}"
    if len(topic) > _MAX_TOPIC_BYTES:
        raise InvalidChannelError(
            f"the channel of {len(channel)} bytes is too long: its topic would have {len(topic)} "
            f"bytes, but MQTT allows at most {_MAX_TOPIC_BYTES}"
        )
    return topic


def format_options(channel: str, options: Iterable[tuple[str, int | None]]) -> str:
    """Append the options that are not ``None`` to a checked channel."""
    given = "&".join(f"{name}={value}" for name, value in options if value is not None)
    return f"{channel}?{given}" if given else channel


def level_hash(level: str) -> int:
    """
    Hash one level, or a path, as the broker does: MurmurHash3 (x86, 32 bits) with seed 37 and
    reversed bytes.
    """
    data = level.encode()
    h = 37
    tail = len(data) & ~3
    for i in range(0, tail, 4):
        h ^= _mix(int.from_bytes(data[i : i + 4], "little"))
        h = ((h << 13 | h >> 19) * 5 + 0xE6546B64) & 0xFFFFFFFF
    if tail < len(data):
        h ^= _mix(int.from_bytes(data[tail:], "little"))
    h ^= len(data)
    h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    h ^= h >> 16
    return int.from_bytes(h.to_bytes(4, "little"), "big")


def _mix(k: int) -> int:
    k = k * 0xCC9E2D51 & 0xFFFFFFFF
    k = (k << 15 | k >> 17) & 0xFFFFFFFF
    return k * 0x1B873593 & 0xFFFFFFFF


@lru_cache(maxsize=4096)
def channel_hash(channel: str) -> int:
    """
    Return the hash by which the broker identifies a subscription: its level hashes, XORed.

    If two subscriptions on the same connection have equal hashes, the broker acknowledges the
    second and never delivers to it (Emitter's ``message/sub.go``).
    """
    mixed = 0
    for level in levels(channel):
        mixed ^= level_hash(level)
    return mixed
