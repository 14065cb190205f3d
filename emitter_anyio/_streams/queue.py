"""A queue that knows how many bytes its items occupy."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from time import time
from typing import Final, Generic, TypeAlias, TypeVar

from emitter_anyio._values.messages import ITEM_OVERHEAD_BYTES, EmitterMessage, Readable
from emitter_anyio._values.requests import PresenceEvent

T = TypeVar("T")

_Put: TypeAlias = tuple[int, int, Sequence[int], float]
"""
Items that were put in together: the number of items and of bytes put in before them, the cumulative
weights of these items, starting with 0, and the unix time.
"""

MAX_BYTES: Final = 8 * 1024 * 1024
"""A buffer with this many bytes is full, whatever the number of its items."""


class Queue(Generic[T]):
    """
    A queue that knows the total weight of its items.

    Each put is recorded with the cumulative weights of its items, and the number of items left
    shows which of them have been received. So receiving an item costs nothing.

    :ivar items: the items, which receive ends remove directly
    """

    def __init__(self) -> None:
        self.items: deque[T] = deque()
        self._count = 0
        """The number of items that were ever put at the end."""
        self._bytes = 0
        """The weight of these items, in bytes."""
        self._puts: deque[_Put] = deque()

    def append(self, item: T, weight: int) -> None:
        """Put an item at the end."""
        self._puts.append((self._count, self._bytes, (0, weight), time()))
        self._bytes += weight
        # The count grows before the deque, here and in extend(), for measure() in another thread.
        self._count += 1
        self.items.append(item)

    def extend(self, items: Sequence[T], sums: Sequence[int]) -> None:
        """
        Put items at the end.

        :param sums: the cumulative weights of the items, in bytes, starting with 0
        """
        if items:
            self._puts.append((self._count, self._bytes, sums, time()))
            self._bytes += sums[-1]
            self._count += len(items)
            self.items += items

    def extend_left(self, items: Sequence[T], sums: Sequence[int]) -> None:
        """Put items at the beginning; ``sums`` is as for :meth:`extend`."""
        start = self._bytes - self.weigh() - sums[-1]
        self._puts.appendleft((self._count - len(self.items) - len(items), start, sums, time()))
        self.items.extendleft(reversed(items))

    def weigh(self) -> int:
        """Return the weight of the items, in bytes, and discard the records of received items."""
        received = self._count - len(self.items)
        while self._puts:
            index, start, sums, _ = self._puts[0]
            if received - index < len(sums) - 1:
                return self._bytes - start - sums[received - index]
            self._puts.popleft()
        return 0

    def measure(self) -> tuple[int, float | None]:
        """
        Return two figures, and change nothing. Any thread may call it.

        :return: the weight of the items, in bytes, and the unix time at which the first of them was
            put in, or ``None`` if there is no item
        """
        received = self._count - len(self.items)
        for index, start, sums, at in tuple(self._puts):
            if received - index < len(sums) - 1:
                return self._bytes - start - sums[received - index], at
        return 0, None


def weight_of(item: object) -> int:
    """
    Return the weight of an item, in bytes.

    A message weighs its payload and its channel, a presence event the ids and user names of its
    members and 128 bytes for each member. Each item weighs another 128 bytes for Python's objects.
    """
    if isinstance(item, Readable):
        return ITEM_OVERHEAD_BYTES + len(item.binary) + len(item.channel)
    if isinstance(item, PresenceEvent):
        return ITEM_OVERHEAD_BYTES + sum(
            ITEM_OVERHEAD_BYTES + len(member.id) + len(member.username or "") for member in item.who
        )
    return ITEM_OVERHEAD_BYTES


def cumulative_weights(items: Sequence[object]) -> Sequence[int]:
    """Return the cumulative weights of items, in bytes, starting with 0."""
    # Nearly all items are messages, for which a function call would double the cost.
    weights = (
        ITEM_OVERHEAD_BYTES + len(item.binary) + len(item.channel)
        if type(item) is EmitterMessage
        else weight_of(item)
        for item in items
    )
    return list(accumulate(weights, initial=0))
