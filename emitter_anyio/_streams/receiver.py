"""What receives messages and events: the send end of a stream, or an object that keeps none."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

T_contra = TypeVar("T_contra", contravariant=True)


class Receiver(Protocol[T_contra]):
    """
    What the client gives messages or events to.

    An object that keeps none of them inherits these methods, because it is never full.
    """

    def __hash__(self) -> int:
        return id(self)

    @property
    def dropped(self) -> int:
        """How many items were dropped because the buffer was full."""
        return 0

    @abstractmethod
    def push(self, item: T_contra, *, extra: bool = False) -> bool:
        """
        Take in one item.

        :param extra: whether it needs no space, as a message that the broker replays
        :return: whether there was space
        """

    def push_many(self, items: Sequence[T_contra], each: int | None = None) -> int:
        """
        Take in items, from the first to as many as there is space for.

        :param items: must not be changed afterwards
        :param each: how many bytes each of them weighs; ``None`` if they differ
        :return: for how many there was space
        """
        for item in items:
            self.push(item)
        return len(items)

    def push_or_drop(self, item: T_contra) -> None:
        """Take in one item, or do what the overflow policy demands."""
        self.push(item)

    def note_gap(self) -> None:
        """Note that the connection was lost, so that messages might be missing."""
        return

    def end(self, error: Callable[[], Exception] | None = None) -> None:
        """
        Take in nothing more.

        :param error: makes what receiving raises after the last item; ``None`` is a normal end
        """
        return
