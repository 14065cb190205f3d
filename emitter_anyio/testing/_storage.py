"""Messages that are kept, for as long as their ttl says, and the ids that history gives them."""

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

#: What one answer replays at most, in bytes of ids, channels and payloads.
REPLAY_LIMIT = 65536
#: How long the broker keeps a message whose retain flag is set: 30 days.
RETAINED = 2592000

_FIRST, _LAST = 1514764800, 3029529600  # 2018 and 2066: a window's bounds, where they mean anything
_MAX = 0xFFFFFFFF
_SORTED_BY_INSERTION = 12
_id = attrgetter("id")


class Stored(NamedTuple):
    """A message that is kept."""

    id: bytes
    time: int
    channel: str
    words: Words
    payload: bytes


class Storage:
    """
    Keeps messages.

    The ids have the real broker's layout (``message/id.go``), which makes their order that of its
    answers: the newest second first, and in a second the newest message first.

    :param contract: the licence's contract, a part of every id
    """

    def __init__(self, contract: int) -> None:
        self._contract = contract
        self.restart(forget=True)

    def restart(self, forget: bool) -> None:
        """Name another node in the ids from now on, and count anew, as each process does."""
        self._node = secrets.token_bytes(4)
        self._count = 0
        if forget:
            self._kept: dict[str, list[Stored]] = {}  # by first level, in the order of the ids
            self._expiries: list[tuple[int, Stored]] = []  # a heap

    def add(self, now: float, ttl: int, channel: str, words: Words, payload: bytes) -> None:
        """
        Keep a message.

        :param now: unix seconds
        :param ttl: seconds; the message is gone once as many whole ones have passed
        """
        self._expire(now)
        time, self._count = int(now), self._count + 1
        levels = [self._contract, *map(level_hash, words)]
        id = b"".join(
            (
                (levels[0] ^ levels[1]).to_bytes(4, "big"),
                (_MAX - (time - _FIRST)).to_bytes(4, "big"),
                (_MAX - self._count).to_bytes(4, "big"),
                self._node,
                *(level.to_bytes(4, "big") for level in levels),
            )
        )
        message = Stored(id, time, channel, words, payload)
        insort(self._kept.setdefault(words[0], []), message, key=_id)
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
        Find the newest messages at and below a channel.

        :param words: the channel's levels; ``+`` and ``#`` stand for one level, but not the first
        :param last: how many at most; :data:`REPLAY_LIMIT` bounds them too
        :param since: unix seconds; out of the range that the broker knows, the window is open
        :param until: as ``since``
        :param after: the id of a message: look at older ones only. As in Emitter, the message that
            is found there is skipped, even if it is not that one but the next older
        :return: the oldest second first, and in a second the newest first
        """
        self._expire(now)
        kept = self._kept.get(words[0], [])
        oldest = since if since is not None and _FIRST <= since <= _LAST else 0
        newest = until if until is not None and _FIRST <= until <= _LAST else _LAST
        found: list[Stored] = []
        size = 0
        for message in kept[bisect_left(kept, after, key=_id) + 1 if after else 0 :]:
            if len(found) >= last or message.time < oldest:
                break
            if message.time > newest or not _below(words, message.words):
                continue
            size += len(message.id) + len(message.channel) + len(message.payload)
            if size > REPLAY_LIMIT:
                break
            found.append(message)
        return sorted(found, key=attrgetter("time"))

    def _expire(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            message = heappop(self._expiries)[1]
            kept = self._kept[message.words[0]]
            del kept[bisect_left(kept, message.id, key=_id)]
            if not kept:
                del self._kept[message.words[0]]


def merge(answers: Sequence[list[Stored]], last: int) -> list[Stored]:
    """
    Put the answers of several nodes together, as ``message/message.go`` does.

    They are sorted by second only, and cut. Go keeps the order of what is equal if there are at
    most 12; here it is random if there are more.

    :param answers: each as :meth:`Storage.query` gives it
    :param last: how many messages at most, the newest ones
    """
    found = [message for answer in answers for message in answer]
    if len(answers) > 1:
        if len(found) > _SORTED_BY_INSERTION:
            random.shuffle(found)
        found.sort(key=attrgetter("time"))
    return found[max(len(found) - last, 0) :]


def _below(query: Words, words: Words) -> bool:
    return len(query) <= len(words) and all(
        wanted in ("+", "#", word) for wanted, word in zip(query, words, strict=False)
    )
