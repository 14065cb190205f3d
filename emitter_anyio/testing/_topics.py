"""The broker's parser of topics: ``key/channel/?option=value&…``.

It is independent of the client's grammar, so that the two check each other. Source: Emitter's
``security/channel.go``.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from ._refusals import RefusedError

#: The levels of a channel.
Words: TypeAlias = tuple[str, ...]

_MAX_INT = 2**63 - 1
_TOPIC = re.compile(
    r"(?P<key>[^/]+)/"
    r"(?P<channel>(?:(?:[-.0-:A-z$]+|[+#*])/)+)"
    r"(?:\?(?P<options>(?:[0-9A-Za-z]+=[0-9A-Za-z]+(?:&|\Z))*))?"
)
_WILDCARDS = frozenset("+#*")


class Topic(NamedTuple):
    """A parsed topic."""

    key: str
    channel: str
    words: Words
    options: tuple[tuple[str, str], ...]

    @property
    def wild(self) -> bool:
        return not _WILDCARDS.isdisjoint(self.words)

    @property
    def safe(self) -> str:
        """The topic without its key."""
        options = "&".join(map("=".join, self.options))
        return f"{self.channel}?{options}" if options else self.channel

    def number(self, name: str) -> int | None:
        """Return the value of an option, or ``None`` if it is missing or not a 64-bit integer."""
        for option, value in self.options:
            if option == name:
                # Check the length first, because int() of thousands of digits raises.
                if not value.isdecimal() or len(value) > 19 or int(value) > _MAX_INT:
                    return None
                return int(value)
        return None


@lru_cache(maxsize=512)
def parse(text: str) -> Topic:
    """
    Parse a topic.

    :raises RefusedError: with status 400, if the topic is malformed
    """
    match = _TOPIC.fullmatch(text)
    if match is None:
        raise RefusedError(400)
    channel, options = match["channel"], match["options"] or ""
    pairs = tuple((name, value) for name, _, value in map(_split, filter(None, options.split("&"))))
    return Topic(match["key"], channel, tuple(channel[:-1].split("/")), pairs)


def _split(option: str) -> tuple[str, str, str]:
    return option.partition("=")
