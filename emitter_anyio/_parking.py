"""Where one task of Trio waits, at less than what an event of its costs."""

from __future__ import annotations

from collections.abc import Awaitable

import trio
from trio.lowlevel import Abort, RaiseCancelT, current_task, reschedule, wait_task_rescheduled


class TaskWakeup:
    """The task itself, without the set of those who wait that an event has."""

    __slots__ = ("_set", "_task")

    def __init__(self) -> None:
        self._set = False
        self._task: trio.lowlevel.Task | None = None

    def set(self) -> None:
        self._set = True
        if self._task is not None:
            reschedule(self._task)
            self._task = None

    def wait(self) -> Awaitable[None]:
        if self._set:
            return _nothing()
        self._task = current_task()
        # One step less for each who waits, where this would be async itself.
        return wait_task_rescheduled(self._leave)  # noqa: ASYNC105 - the one who asks awaits it

    def _leave(self, _: RaiseCancelT) -> Abort:
        self._task = None
        return Abort.SUCCEEDED


async def _nothing() -> None:
    """What has happened already is waited for."""
