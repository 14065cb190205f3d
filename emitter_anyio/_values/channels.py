"""Channels, keys and options: what the broker takes, checked before it leaves, and how they make a
topic.

A topic that goes to the broker is ``key/channel/?option=value&option=value``; one that comes from
it is the channel alone. The rules are the broker's own (its ``security/channel.go``), as seen on a
running one.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from functools import lru_cache
from typing import Final, TypeAlias

from .checks import check_function, check_text, is_number
from .errors import InvalidChannelError

Key: TypeAlias = str | Callable[[], Awaitable[str]]
"""A key, or an ``async`` function that returns one and is asked again when it was refused."""

PLACEHOLDER_KEY: Final = "k" * 32
"""As long as the key that a function will return."""

MAX_KEY_LEVELS: Final = 23
"""The target of a key has at most so many levels: the broker keeps a bit for each."""

_FIRST_SECOND: Final = 1514764800
_LAST_SECOND: Final = 3029529600
"""The broker takes a ``from`` or ``until`` outside 2018 … 2066 as though it had not been given."""

_MAX_TOPIC_BYTES: Final = 65535

_LEVEL = re.compile(r"[$\-.0-9:A-Z\[\\\]^_`a-z]+\Z", re.ASCII)
_INVALID_IN_KEY = re.compile(r"[^!-~]|[/?#+]")


def levels(channel: str) -> list[str]:
    """Split a checked channel, which ends with a slash, into its levels."""
    return channel[:-1].split("/")


def check_channel(channel: str, *, wildcards: bool = False) -> str:
    """
    Check a channel and give it its trailing slash.

    :param channel: levels of ``$ - . 0-9 : A-Z [ \\ ] ^ _ ` a-z``, with slashes between them
    :param wildcards: whether a level may be ``+``, and the last one ``#``
    :return: the channel with a trailing slash
    :raises InvalidChannelError: if the broker would not take it
    """
    return _check_channel(check_text("channel", channel, " such as 'chat/'"), wildcards)


@lru_cache(maxsize=1024)
def _check_channel(channel: str, wildcards: bool) -> str:
    if not channel.strip("/"):
        raise InvalidChannelError("the channel is empty; give one such as 'chat/'")
    whole = channel if channel.endswith("/") else channel + "/"
    if len(whole) > _MAX_TOPIC_BYTES:
        raise InvalidChannelError(
            f"the channel has {len(whole)} characters; the topics of MQTT have at most "
            f"{_MAX_TOPIC_BYTES}"
        )
    parts = levels(whole)
    for number, level in enumerate(parts, 1):
        if not level:
            raise InvalidChannelError(
                f"channel {channel!r} has an empty level: write one slash between two levels, "
                "and none at the start"
            )
        if level in ("+", "#"):
            if not wildcards:
                raise InvalidChannelError(
                    f"channel {channel!r} has the wildcard {level!r}, which stands only in a "
                    "subscription or in the target of a key; name one channel"
                )
            if level == "#" and number < len(parts):
                raise InvalidChannelError(
                    f"channel {channel!r} has a '#' before its end; it may only be the last level"
                )
        elif not _LEVEL.match(level):
            bad = next(c for c in level if not _LEVEL.match(c))
            raise InvalidChannelError(
                f"channel {channel!r} has the character {bad!r}, which Emitter does not take; "
                "a level is made of letters, digits and $ - . : [ \\ ] ^ _ `"
            )
    return whole


def check_group(group: str) -> str:
    """
    Check the name of a share group.

    :raises InvalidChannelError: if it is not one level of a channel, without wildcards
    """
    name = check_channel(check_text("group", group))[:-1]
    if "/" in name:
        raise InvalidChannelError(f"group {name!r} has a slash: a group's name is one level")
    return name


def share(group: str | None, channel: str) -> str:
    """Put the group, if any, before a checked channel."""
    return channel if group is None else f"$share/{group}/{channel}"


def unshare(filter: str) -> tuple[str | None, str]:
    """Take a filter apart into its group, if any, and its channel."""
    if filter.startswith("$share/") and filter.count("/") > 2:
        group, _, channel = filter[len("$share/") :].partition("/")
        return group, channel
    return None, filter


def check_target(channel: str) -> str:
    """
    Check the target of a key: a channel, which may have wildcards and at most 23 levels.

    :return: the target with a trailing slash
    :raises InvalidChannelError: if the broker would not make a key for it
    """
    target = check_channel(channel, wildcards=True)
    depth = len(levels(target.removesuffix("#/")))
    if depth > MAX_KEY_LEVELS:
        raise InvalidChannelError(
            f"channel {target!r} has {depth} levels; a key covers at most {MAX_KEY_LEVELS}: "
            "make it for a parent, such as 'a/b/#/'"
        )
    return target


def check_key_source(key: Key) -> Key:
    """
    Check what stands for a key: the key, or a function that will be asked for it.

    :return: the key as a plain ``str``, or the function
    :raises TypeError: if it is neither
    :raises ValueError: as :func:`check_key`
    """
    if isinstance(key, str) or not callable(key):
        return check_key(key)
    # The keys that functions have returned are kept in a dict.
    hash(check_function("key", key))
    return key


def check_key(key: str) -> str:
    """
    Check that a key can stand in a topic; whether it opens anything, the broker says.

    :return: the key as a plain ``str``
    :raises ValueError: if a character of it would change the meaning of the topic; the key is not
        shown
    """
    key = check_text("key", key, " or an async function that returns a str")
    if not key:
        raise ValueError("the key is empty; keygen() makes one")
    if bad := _INVALID_IN_KEY.search(key):
        raise ValueError(
            f"the key has the character {bad[0]!r} at position {bad.start()}; keys are made of "
            "letters, digits, '-' and '_'"
        )
    return key


def unix_seconds(name: str, value: datetime | float | None) -> int | None:
    """
    Turn a point in time into the unix seconds that the broker takes.

    :param value: an aware ``datetime``, or unix seconds
    :raises ValueError: if it is a naive ``datetime``, or so far away that the broker would pass
        over it
    """
    if value is None:
        return None
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise ValueError(f"{name} is a naive datetime: give it a tzinfo, such as timezone.utc")
        seconds = value.timestamp()
    elif is_number(value):
        seconds = value
    else:
        raise TypeError(f"{name} is a datetime or unix seconds, not {type(value).__name__}")
    if not _FIRST_SECOND <= seconds <= _LAST_SECOND:
        raise ValueError(
            f"{name} is {seconds}; the broker knows the unix seconds {_FIRST_SECOND} (2018) "
            f"to {_LAST_SECOND} (2066) and would pass over this one"
        )
    return int(seconds)


def format_topic(key: str, channel: str, options: Iterable[tuple[str, int | None]] = ()) -> str:
    """
    Put a topic together from checked parts.

    :param options: names and values in the order of the topic; a ``None`` leaves its option out
    :raises InvalidChannelError: if it is longer than MQTT allows
    """
    topic = f"{key}/{format_options(channel, options)}"
    if len(topic) > _MAX_TOPIC_BYTES:
        raise InvalidChannelError(
            f"the topic of a channel of {len(channel)} bytes would have {len(topic)}; MQTT takes "
            f"{_MAX_TOPIC_BYTES}"
        )
    return topic


def format_options(channel: str, options: Iterable[tuple[str, int | None]]) -> str:
    """Put the options that are given behind a checked channel."""
    given = "&".join(f"{name}={value}" for name, value in options if value is not None)
    return f"{channel}?{given}" if given else channel


def level_hash(level: str) -> int:
    """
    Hash one level, or a path, as the broker does: MurmurHash3 (x86, 32 bits) with seed 37, its
    bytes reversed.
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
    Give what the broker tells the subscriptions of one link apart by: the level hashes, XORed.

    Two channels with the same one get in each other's way there (its ``message/sub.go``): the
    second is acknowledged and never delivered.
    """
    mixed = 0
    for level in levels(channel):
        mixed ^= level_hash(level)
    return mixed
