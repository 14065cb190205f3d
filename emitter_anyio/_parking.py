"""Waiting for one answer, in the way that costs least on each backend."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

from ._reading import asyncio_loop


class Wakeup(Protocol):
    """What one task waits for; as AnyIO's, which is made at several times the cost."""

    def set(self) -> None:
        """Wake the one who waits, if there is still one."""

    @abstractmethod
    def wait(self) -> Awaitable[None]:
        """Wait until it is set; whoever makes it does so before that."""


class FutureEvent:
    """A future of asyncio, for one task: the loop's own event makes one, too."""

    __slots__ = ("_future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._future: asyncio.Future[None] = loop.create_future()

    def set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def wait(self) -> Awaitable[None]:
        return self._future


def event_maker() -> Callable[[], Wakeup]:
    """Give what makes them on the backend that runs."""
    loop = asyncio_loop()
    if loop is not None:
        return partial(FutureEvent, loop)
    import trio

    return trio.Event
