"""Stored messages, and the ids that history gives them."""

from __future__ import annotations

import random
import secrets
from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from emitter_anyio._values.channels import level_hash

if TYPE_CHECKING:
    from ._topics import Words

#: The largest total size of the ids, channels and payloads in a reply, in bytes.
REPLAY_LIMIT_BYTES = 65536
#: The time for which Emitter stores a message with the retain flag: 30 days.
RETAINED_SECONDS = 2592000

_MIN_TIME, _MAX_TIME = (
    1514764800,
    3029529600,
)  # 2018 and 2066: Emitter ignores bounds outside
_MAX = 0xFFFFFFFF
_MAX_STABLE_SORT_ITEMS = 12
_id = attrgetter("id")


class Stored(NamedTuple):
    """A stored message."""

    id: bytes
    time: int
    channel: str
    words: Words
    payload: bytes


class Storage:
    """
    The stored messages of a node.

    The ids have Emitter's layout (``message/id.go``). Their order is that of Emitter's replies:
    newest first.

    :param contract: the contract of the licence, which is a part of each id
    """

    def __init__(self, contract: int) -> None:
        self._contract = contract
        self.restart(forget=True)

    def restart(self, forget: bool) -> None:
        """Use a new node number in ids and restart their counter, like a new process."""
        self._node = secrets.token_bytes(4)
        self._count = 0
        if forget:
            self._messages: dict[str, list[Stored]] = {}  # by first level, in the order of the ids
            self._expiries: list[tuple[int, Stored]] = []  # a heap

    def add(self, now: float, ttl: int, channel: str, words: Words, payload: bytes) -> None:
        """
        Store a message.

        :param now: the time in Unix seconds
        :param ttl: the whole seconds after which the message expires
        """
        self._expire(now)
        time, self._count = int(now), self._count + 1
        levels = [self._contract, *map(level_hash, words)]
        id = b"".join(
            (
                (levels[0] ^ levels[1]).to_bytes(4, "big"),
                (_MAX - (time - _MIN_TIME)).to_bytes(4, "big"),
                (_MAX - self._count).to_bytes(4, "big"),
                self._node,
                *(level.to_bytes(4, "big") for level in levels),
            )
        )
        message = Stored(id, time, channel, words, payload)
        insort(self._messages.setdefault(words[0], []), message, key=_id)
        heappush(self._expiries, (time + ttl, message))

    def query(
        self,
        now: float,
        words: Words,
        last: int,
        since: int | None = None,
        until: int | None = None,
        after: bytes = b"",
    ) -> list[Stored]:
        """
        Return the newest messages at and below a channel.

        :param words: the levels of the channel; ``+`` and ``#`` match any one level, except the
            first
        :param last: the largest number of messages, also limited by :data:`REPLAY_LIMIT_BYTES`
        :param since: the time of the oldest message in Unix seconds; ignored outside 2018 to 2066
        :param until: the time of the newest message in Unix seconds; ignored outside 2018 to 2066
        :param after: the id of a message, to return only older ones; like Emitter, skip the message
            at its position even if that is already the next older message
        :return: the messages, with the oldest second first, and the newest first in each second
        """
        self._expire(now)
        kept = self._messages.get(words[0], [])
        oldest = since if since is not None and _MIN_TIME <= since <= _MAX_TIME else 0
        newest = until if until is not None and _MIN_TIME <= until <= _MAX_TIME else _MAX_TIME
        found: list[Stored] = []
        size = 0
        for message in kept[bisect_left(kept, after, key=_id) + 1 if after else 0 :]:
            if len(found) >= last or message.time < oldest:
                break
            if message.time > newest or not _below(words, message.words):
                continue
            size += len(message.id) + len(message.channel) + len(message.payload)
            if size > REPLAY_LIMIT_BYTES:
                break
            found.append(message)
        return sorted(found, key=attrgetter("time"))

    def _expire(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            message = heappop(self._expiries)[1]
            kept = self._messages[message.words[0]]
            del kept[bisect_left(kept, message.id, key=_id)]
            if not kept:
                del self._messages[message.words[0]]


def merge(answers: Sequence[list[Stored]], last: int) -> list[Stored]:
    """
    Merge the replies of several nodes like Emitter (``message/message.go``).

    The messages are sorted only by second, and then cut. Go's sort keeps the order of equal items
    if there are at most 12; for more, the order here is random.

    :param answers: the results of :meth:`Storage.query`
    :param last: the largest number of messages; older ones are cut
    """
    found = [message for answer in answers for message in answer]
    if len(answers) > 1:
        if len(found) > _MAX_STABLE_SORT_ITEMS:
            random.shuffle(found)
        found.sort(key=attrgetter("time"))
    return found[max(len(found) - last, 0) :]


def _below(query: Words, words: Words) -> bool:
    return len(query) <= len(words) and all(
        wanted in ("+", "#", word) for wanted, word in zip(query, words, strict=False)
    )
