"""Where one task of Trio waits, at less than what an event of its costs."""

from __future__ import annotations

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

    async def wait(self) -> None:
        if not self._set:
            self._task = current_task()
            await wait_task_rescheduled(self._leave)

    def _leave(self, _: RaiseCancelT) -> Abort:
        self._task = None
        return Abort.SUCCEEDED
