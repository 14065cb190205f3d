"""Items in their order, and how many bytes they weigh."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import Final, Generic, TypeAlias, TypeVar

from emitter_anyio._values.messages import ITEM_OVERHEAD_BYTES, EmitterMessage, Readable
from emitter_anyio._values.requests import PresenceEvent

T = TypeVar("T")

_Put: TypeAlias = tuple[int, int, Sequence[int]]
"""
What was put in together: how many items and how many bytes were put in before, and how many bytes
the first none, one, two and so on of these items weigh.
"""

MAX_BYTES: Final = 8 * 1024 * 1024
"""A buffer whose items weigh this many bytes is full, however few they are."""


class Queue(Generic[T]):
    """
    A queue that knows the weight of its items.

    It costs nothing for each item that is received: each put is recorded with the weights of its
    items, and how many of them are gone follows from how many are left.

    :ivar items: whoever receives takes items out of this deque
    """

    def __init__(self) -> None:
        self.items: deque[T] = deque()
        self._count = 0
        """How many items were ever put at the end."""
        self._bytes = 0
        """How many bytes these weigh."""
        self._puts: deque[_Put] = deque()

    def append(self, item: T, weight: int) -> None:
        """Put an item at the end."""
        self._puts.append((self._count, self._bytes, (0, weight)))
        self._bytes += weight
        # Before the item is in, here and below: total() might be called in another thread.
        self._count += 1
        self.items.append(item)

    def extend(self, items: Sequence[T], sums: Sequence[int]) -> None:
        """
        Put items at the end.

        :param sums: how many bytes the first none, one, two and so on of them weigh
        """
        if items:
            self._puts.append((self._count, self._bytes, sums))
            self._bytes += sums[-1]
            self._count += len(items)
            self.items += items

    def extend_left(self, items: Sequence[T], sums: Sequence[int]) -> None:
        """Put items at the beginning."""
        start = self._bytes - self.weigh() - sums[-1]
        self._puts.appendleft((self._count - len(self.items) - len(items), start, sums))
        self.items.extendleft(reversed(items))

    def weigh(self) -> int:
        """Return how many bytes its items weigh, and forget puts of which nothing is left."""
        gone = self._count - len(self.items)
        while self._puts:
            index, start, sums = self._puts[0]
            if gone - index < len(sums) - 1:
                return self._bytes - start - sums[gone - index]
            self._puts.popleft()
        return 0

    def total(self) -> int:
        """Return the same and change nothing, so that any thread may call this."""
        gone = self._count - len(self.items)
        for index, start, sums in tuple(self._puts):
            if gone - index < len(sums) - 1:
                return self._bytes - start - sums[gone - index]
        return 0


def weight_of(item: object) -> int:
    """
    Return how many bytes an item weighs.

    These are the payload and the channel of a message, or what a presence event contains about
    each client, and 128 bytes for what Python keeps around them.
    """
    if isinstance(item, Readable):
        return ITEM_OVERHEAD_BYTES + len(item.binary) + len(item.channel)
    if isinstance(item, PresenceEvent):
        return ITEM_OVERHEAD_BYTES + sum(
            ITEM_OVERHEAD_BYTES + len(member.id) + len(member.username or "") for member in item.who
        )
    return ITEM_OVERHEAD_BYTES


def sums_of_weights(items: Sequence[object]) -> Sequence[int]:
    """Return how many bytes the first none, one, two and so on of several items weigh."""
    # Nearly all are messages, for which a call would double the cost.
    weights = (
        ITEM_OVERHEAD_BYTES + len(item.binary) + len(item.channel)
        if type(item) is EmitterMessage
        else weight_of(item)
        for item in items
    )
    return list(accumulate(weights, initial=0))
