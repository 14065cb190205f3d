"""What runs in background tasks from entering to leaving."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

from anyio import TASK_STATUS_IGNORED, CancelScope, get_cancelled_exc_class, sleep_forever
from anyio.abc import TaskStatus

from emitter_anyio._tasks import Tasks


class Service(ABC):
    """Something that is entered with ``async with``, or run in a task."""

    _tasks: Tasks | None = None
    _failure: BaseException | None = None

    # Not by AnyIO's mixin: with a generator between the user and the task group, the run of an
    # event loop in which the block is never left would not end.

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise RuntimeError(f"this {type(self).__name__} is already entered: leave it first")
        self._failure = None
        self._tasks = tasks = Tasks(self._task_failed)
        await tasks.open()
        try:
            await self._begin(tasks)
        except BaseException:
            await self._leave(tasks)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        tasks = self._tasks
        if tasks is None:
            raise RuntimeError(f"this {type(self).__name__} is not entered")
        await self._leave(tasks)
        if self._failure is not None:
            raise self._failure
        if not (tasks.hosted_here or tasks.host_ended):
            name = type(self).__name__
            raise RuntimeError(
                f"the {name} was left in another task than the one that entered it, and that task "
                "still runs: it has ended, but the first task has to leave, too. Use 'async with' "
                f"in one task, or have a task run it: await task_group.start({name.lower()}.run)"
            ) from exc

    async def run(self, *, task_status: TaskStatus[Any] = TASK_STATUS_IGNORED) -> None:
        """
        Live in a task of the caller's, until it is cancelled: ``await task_group.start(x.run)``.

        :param task_status: is told this object once it listens
        """
        async with self:
            task_status.started(self)
            await sleep_forever()

    async def _leave(self, tasks: Tasks) -> None:
        try:
            with CancelScope(shield=True):
                await self._end(tasks)
        finally:
            if tasks.hosted_here:
                self._tasks = None
                await tasks.close()
            elif tasks.host_ended:
                self._tasks = None

    def _task_failed(self, error: BaseException) -> None:
        if not isinstance(error, get_cancelled_exc_class()):
            self._failure = error
            assert self._tasks is not None
            self._tasks.cancel()

    @abstractmethod
    async def _begin(self, tasks: Tasks) -> None:
        """Start the tasks."""

    @abstractmethod
    async def _end(self, tasks: Tasks) -> None:
        """Stop the tasks, wait for them, and close what they have used."""
