"""Which backend runs, and what is cheaper on it than what AnyIO has for both."""

from __future__ import annotations

import asyncio
import sys
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from threading import get_ident
from typing import Protocol

from anyio.abc import TaskGroup

from ._errors import WrongLoopError


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


def _current_run() -> object:
    """Give what stands for the event loop, or the run of Trio, that runs the calling code."""
    trio = sys.modules.get("trio")
    # In guest mode, a loop of asyncio runs around Trio.
    if trio is not None and trio.lowlevel.in_trio_task():
        return trio.lowlevel.current_trio_token()
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _task_check(run: object) -> Callable[[], object]:
    """Return a fast check of whether a task of an event loop runs in the loop's own thread."""
    if isinstance(run, asyncio.AbstractEventLoop):
        # While a guest run of Trio is at work, there is no task of the loop around it.
        return partial(asyncio.current_task, run)
    if run is None:
        return bool
    import trio

    in_task, token = trio.lowlevel.in_trio_task, trio.lowlevel.current_trio_token
    return lambda: in_task() and token() is run


class Owner:
    """
    The thread and the event loop to which something belongs, as long as it is used.

    Code outside of any event loop waits for nothing, so that only its thread counts.

    :ivar thread: the thread's identifier. Hot paths compare only this, and call :meth:`check` where
        it differs
    """

    __slots__ = ("_run", "_task_runs", "_uses", "thread")

    def __init__(self) -> None:
        self.thread: int = 0
        self._run: object = None
        self._task_runs: Callable[[], object] = bool
        """Whether a task of the event loop runs in the thread. Other code might, too."""
        self._uses = 0

    def claim(self) -> None:
        """
        Begin a use in the event loop that runs.

        :raises WrongLoopError: if it is in use in another one
        """
        if self._uses:
            self.check()
        self._uses += 1
        self.thread, self._run = get_ident(), _current_run()
        self._task_runs = _task_check(self._run)

    def release(self) -> None:
        """End a use."""
        self._uses -= 1

    def check(self) -> None:
        """
        See to it that the calling code may use it.

        :raises WrongLoopError: if it is in use in another event loop
        """
        if not self._uses:
            return
        here = get_ident() == self.thread
        if here and self._task_runs():
            return
        run = _current_run()
        if not here or (run is not self._run and None not in (run, self._run)):
            raise WrongLoopError(
                "wrong thread or event loop: a client and its streams belong to the one in which "
                "the client was entered; call them there, from other threads by "
                "anyio.from_thread.run() or a blocking portal"
            )


def current_task() -> object:
    """Give the task that runs."""
    if asyncio_loop() is not None:
        return asyncio.current_task()
    import trio

    return trio.lowlevel.current_task()


def has_ended(task: object) -> bool:
    """Tell whether a task has ended; on Trio, one that has left a task group open never does."""
    return isinstance(task, asyncio.Task) and task.done()


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
