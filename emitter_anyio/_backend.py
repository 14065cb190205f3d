"""Which backend runs, and what is cheaper on it than what AnyIO has for both."""

from __future__ import annotations

import asyncio
import sys
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

from anyio.abc import TaskGroup


class Wakeup(Protocol):
    """What one task waits for: as AnyIO's, which costs several times as much to make."""

    def set(self) -> None:
        """Wake the one who waits, if there is still one."""

    @abstractmethod
    def wait(self) -> Awaitable[None]:
        """Wait until it is set; one that may be set already is no checkpoint."""


class FutureWakeup:
    """
    A future of asyncio, which the loop's own event makes, too, for each who waits.

    :param loop: the loop that runs
    """

    __slots__ = ("_future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._future: asyncio.Future[None] = loop.create_future()

    def set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def wait(self) -> Awaitable[None]:
        return self._future


def asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """Give the running loop, if it is one of asyncio."""
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        return None
    return asyncio.get_running_loop()


def clock_of(loop: asyncio.AbstractEventLoop | None) -> Callable[[], float]:
    """
    Return what tells the time on the backend that runs.

    :param loop: what :func:`asyncio_loop` has returned
    """
    if loop is not None:
        return loop.time
    # Where Trio runs its import is done, and nobody else is to wait for it.
    import trio

    return trio.current_time


def task_starter(group: TaskGroup) -> Callable[..., object]:
    """
    Give what starts a task in a group.

    :param group: the one that the calling task has entered last
    """
    if asyncio_loop() is not None:
        return group.start_soon
    # AnyIO has each task watched by a scope and an event of its own, which Trio's nursery does
    # without, and nobody here asks for: half of what it costs.
    import trio

    return trio.lowlevel.current_task().child_nurseries[-1].start_soon


def wakeup_maker() -> Callable[[], Wakeup]:
    """Give what makes them on the backend that runs."""
    loop = asyncio_loop()
    if loop is not None:
        return partial(FutureWakeup, loop)
    # Where Trio runs its import is done, and nobody else is to wait for it.
    from ._parking import TaskWakeup

    return TaskWakeup
