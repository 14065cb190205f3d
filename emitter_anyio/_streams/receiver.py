"""The interface of objects that receive messages and events."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

T_contra = TypeVar("T_contra", contravariant=True)


class Receiver(Protocol[T_contra]):
    """
    An object to which the client delivers messages or events.

    A receiver that buffers nothing inherits these methods, because it is never full.
    """

    def __hash__(self) -> int:
        return id(self)

    @property
    def dropped(self) -> int:
        """The number of items that were dropped because the buffer was full."""
        return 0

    @abstractmethod
    def push(self, item: T_contra, *, extra: bool = False) -> bool:
        """
        Accept one item.

        :param extra: whether the item needs no space, like a message that the broker replays
        :return: whether there was space
        """

    def push_many(self, items: Sequence[T_contra], each: int | None = None) -> int:
        """
        Accept items in order, as many as there is space for.

        :param items: the items, which must not be changed afterwards
        :param each: the weight of each item, in bytes; ``None`` if the weights differ
        :return: the number of accepted items
        """
        for item in items:
            self.push(item)
        return len(items)

    def push_or_drop(self, item: T_contra) -> None:
        """Accept one item, or apply the overflow policy."""
        self.push(item)

    def note_gap(self) -> None:
        """Note that the connection was lost, so that messages might be missing."""
        return

    def end(self, error: Callable[[], Exception] | None = None) -> None:
        """
        Accept nothing more.

        :param error: makes the exception that receiving raises after the last item; ``None`` ends
            the stream normally
        """
        return
