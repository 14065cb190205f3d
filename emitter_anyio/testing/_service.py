"""The background tasks of the broker and of the proxy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final, Self

from anyio import CancelScope, get_cancelled_exc_class, sleep_forever

from emitter_anyio._backend.interrupts import uninterrupted
from emitter_anyio._backend.tasks import Tasks


class Service:
    """
    The background tasks of an object that is entered with ``async with`` or run in a task.

    :param name: the name of the object's class, for error messages
    :param start: a function that starts the tasks
    :param end: a function that stops the tasks, waits for them, and closes their resources
    """

    # Do not use AnyIO's context manager mixin: its generator would stand between the user and the
    # task group, and an event loop in which the block is never left would not end.

    def __init__(
        self,
        name: str,
        start: Callable[[Tasks], Awaitable[None]],
        end: Callable[[Tasks], Awaitable[None]],
    ) -> None:
        self._name: Final = name
        self._start: Final = start
        self._end: Final = end
        self._tasks: Tasks | None = None
        self._failure: BaseException | None = None

    @property
    def tasks(self) -> Tasks | None:
        """The tasks, or ``None`` outside the block."""
        return self._tasks

    @uninterrupted
    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise RuntimeError(
                f"cannot enter this {self._name}: it is already entered; leave it first"
            )
        self._failure = None
        self._tasks = tasks = Tasks(self._task_failed)
        await tasks.open()
        try:
            await self._start(tasks)
        except BaseException:
            await self._leave(tasks)
            raise
        return self

    @uninterrupted
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        tasks = self._tasks
        if tasks is None:
            raise RuntimeError(f"cannot leave this {self._name}: it is not entered")
        await self._leave(tasks)
        if self._failure is not None:
            raise self._failure
        if not (tasks.hosted_here or tasks.host_ended):
            raise RuntimeError(
                f"cannot leave this {self._name} completely: another task entered it and is still "
                "running; use 'async with' in one task, or "
                f"'await task_group.start({self._name.lower()}.run)'"
            ) from exc

    async def run(self, started: Callable[[], None]) -> None:
        """
        Enter the object, and leave it when the calling task is cancelled.

        :param started: a function that is called after entering
        """
        async with self:
            started()
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
