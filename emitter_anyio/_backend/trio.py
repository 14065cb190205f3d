"""The Trio backend."""

from __future__ import annotations

import socket
from collections.abc import Awaitable
from functools import partial

import trio
from trio import lowlevel

from .interface import Backend, Reader, WaitingReader, Wakeup
from .interrupts import mark_all


class TrioBackend(Backend):
    """The Trio run of the calling task."""

    def __init__(self) -> None:
        mark_all(lowlevel.enable_ki_protection)
        self.token = lowlevel.current_trio_token()
        self.clock = trio.current_time
        self.make_wakeup = TaskWakeup
        self.runs_task = partial(_runs_task, self.token)
        # Not checkpoint(), which takes two turns if the task is cancelled.
        self.pause = lowlevel.cancel_shielded_checkpoint

    def open_reader(self, sock: socket.socket) -> Reader:
        return WaitingReader(sock, self.clock)

    def current_task(self) -> object:
        return lowlevel.current_task()

    def has_ended(self, task: object) -> bool:
        # Trio ends the run if a task ends with an open nursery.
        return False

    def abandons_tasks(self, host: object) -> bool:
        return isinstance(host, lowlevel.Task) and host.coro.cr_frame is None

    def native_cancellations(self) -> int:
        return 0


class TaskWakeup(Wakeup):
    """A reference to the waiting task, which is cheaper than the set of tasks in ``trio.Event``."""

    __slots__ = ("_set", "_task")

    def __init__(self) -> None:
        self._set = False
        self._task: lowlevel.Task | None = None

    def set(self) -> None:
        self._set = True
        if self._task is not None:
            lowlevel.reschedule(self._task)
            self._task = None

    def wait(self) -> Awaitable[None]:
        if self._set:
            return _nothing()
        self._task = lowlevel.current_task()
        # Return the coroutine instead of awaiting it, which would add a call per wait.
        return lowlevel.wait_task_rescheduled(self._leave)  # noqa: ASYNC105 - the caller awaits it

    def _leave(self, _: lowlevel.RaiseCancelT) -> lowlevel.Abort:
        self._task = None
        return lowlevel.Abort.SUCCEEDED


def _runs_task(token: lowlevel.TrioToken) -> bool:
    return lowlevel.in_trio_task() and lowlevel.current_trio_token() is token


async def _nothing() -> None:
    """Return without a checkpoint."""
