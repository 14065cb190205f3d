"""Emitter's topics as the broker reads them: ``key/channel/?option=value&…``.

Written independently of the client's grammar, so that each checks the other. What may stand where
was seen in the broker's ``security/channel.go``.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from ._refusals import RefusedError

#: A channel's levels.
Words: TypeAlias = tuple[str, ...]

_MAX_INT = 2**63 - 1
_TOPIC = re.compile(
    r"(?P<key>[^/]+)/"
    r"(?P<channel>(?:(?:[-.0-:A-z$]+|[+#*])/)+)"
    r"(?:\?(?P<options>(?:[0-9A-Za-z]+=[0-9A-Za-z]+(?:&|\Z))*))?"
)
_WILDCARDS = frozenset("+#*")


class Topic(NamedTuple):
    """A topic that could be read."""

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
        """Give an option's value; one that is no number counts as not given."""
        for option, value in self.options:
            if option == name:
                # more digits than a 64-bit number has are no number there either
                if not value.isdecimal() or len(value) > 19 or int(value) > _MAX_INT:
                    return None
                return int(value)
        return None


@lru_cache(maxsize=512)
def parse(text: str) -> Topic:
    """
    Read a topic.

    :raises RefusedError: with 400, when it is none
    """
    match = _TOPIC.fullmatch(text)
    if match is None:
        raise RefusedError(400)
    channel, options = match["channel"], match["options"] or ""
    pairs = tuple((name, value) for name, _, value in map(_split, filter(None, options.split("&"))))
    return Topic(match["key"], channel, tuple(channel[:-1].split("/")), pairs)


def _split(option: str) -> tuple[str, str, str]:
    return option.partition("=")
