"""Background tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import anyio
from anyio.lowlevel import cancel_shielded_checkpoint

from emitter_anyio._backend import current_backend


class Tasks:
    """
    A task group that records whether it has started any task.

    Its tasks never raise. Their exceptions are reported instead, so that the surrounding block
    raises its own exception, and not in an exception group.

    :param failed: called with the exception of a task. A ``CancelledError`` means that
        ``Task.cancel()`` was called on the task
    :ivar used: whether :meth:`start_soon` was called. If not, no task needs to be cancelled, which
        saves time when closing
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._backend = current_backend()
        self._group = anyio.create_task_group()
        self._host: object = None
        """The task that opened the group, and must close it."""
        self._scopes: set[anyio.CancelScope] = set()
        self._running = 0
        self._none_runs: anyio.Event | None = None
        self.used = False
        self.abandoned: Callable[[], bool] = partial(self._backend.abandons_tasks, None)
        """Returns whether the tasks have one more turn to end: the group was never closed."""

    @property
    def hosted_here(self) -> bool:
        """Whether the calling task opened the group, and so can close it."""
        return self._host is current_backend().current_task()

    @property
    def host_ended(self) -> bool:
        """Whether the task that opened the group has ended, so that the group is never closed."""
        return current_backend().has_ended(self._host)

    async def open(self) -> None:
        """Open the group in the calling task."""
        await self._group.__aenter__()
        self._host = self._backend.current_task()
        self.abandoned = partial(self._backend.abandons_tasks, self._host)

    async def close(self) -> None:
        """
        Wait for all tasks, in the task that opened the group.

        :raises KeyboardInterrupt: if it was raised where no task could report it
        """
        try:
            await self._group.__aexit__(None, None, None)
        except BaseExceptionGroup as group:
            raise _interrupt_in(group) or group from None

    def start(
        self,
        function: Callable[..., Coroutine[Any, Any, None]],
        *arguments: object,
        name: object = None,
    ) -> None:
        """Start a task that ends without being cancelled."""
        self._group.start_soon(self._run_counted, function, *arguments, name=name)

    def start_soon(
        self,
        function: Callable[..., Coroutine[Any, Any, None]],
        *arguments: object,
        name: object = None,
    ) -> anyio.CancelScope:
        """Start a task that :meth:`stop` cancels; return its cancel scope."""
        self.used = True
        scope = anyio.CancelScope()
        self._scopes.add(scope)
        name = name or f"{function.__module__}.{function.__qualname__}"
        self.start(self._run_in_scope, scope, function, *arguments, name=name)
        return scope

    async def run(
        self, function: Callable[..., Coroutine[Any, Any, None]], *arguments: object
    ) -> None:
        """Run a function in the calling task, and report its exceptions."""
        try:
            await function(*arguments)
        except anyio.get_cancelled_exc_class() as exc:
            if is_cancelled():
                raise
            self._failed(exc)
        except BaseException as exc:
            self._failed(_interrupt_in(exc) or exc)

    def cancel(self) -> None:
        """Cancel all tasks, and the body of the group."""
        self._group.cancel_scope.cancel()

    def stop(self) -> None:
        """Cancel the tasks that :meth:`start_soon` started."""
        for scope in self._scopes:
            scope.cancel()

    async def stopped(self) -> None:
        """Wait for all tasks; callable from any task."""
        while True:
            # Only tasks that have begun are counted, because Task.cancel() might keep a task from
            # beginning. Two checkpoints let all begin: in one, Trio might run this task first.
            for _ in range(2):
                await cancel_shielded_checkpoint()
            if not self._running:
                return
            if self._none_runs is None:
                self._none_runs = anyio.Event()
            await self._none_runs.wait()

    async def _run_counted(
        self, function: Callable[..., Coroutine[Any, Any, None]], *arguments: object
    ) -> None:
        self._running += 1
        try:
            await self.run(function, *arguments)
        finally:
            self._running -= 1
            if self._none_runs is not None and not self._running:
                self._none_runs.set()
                self._none_runs = None

    async def _run_in_scope(
        self,
        scope: anyio.CancelScope,
        function: Callable[..., Coroutine[Any, Any, None]],
        *arguments: object,
    ) -> None:
        with scope:
            await self.run(function, *arguments)
        self._scopes.discard(scope)


def is_cancelled() -> bool:
    """
    Return whether the current task is cancelled by a scope.

    When a program ends without leaving a client, Trio cancels the client's tasks and lets them run
    once more. A task that does not end then causes a ``TrioInternalError``, which hides the
    program's own exception.
    """
    return anyio.current_effective_deadline() == -math.inf


async def sleep(seconds: float) -> bool:
    """
    Sleep; return whether the task is to go on.

    In a task group that was never left, Trio's scopes catch cancellations that are not their own,
    and so does the scope in Trio's ``sleep()``.
    """
    if not is_cancelled():
        await anyio.sleep(seconds)
    return not is_cancelled()


def ends_program(error: BaseException) -> bool:
    """Return whether an exception is a ``KeyboardInterrupt`` or ``SystemExit``."""
    return isinstance(error, KeyboardInterrupt | SystemExit)


def _interrupt_in(error: BaseException) -> BaseException | None:
    """Return the ``KeyboardInterrupt`` or ``SystemExit`` in a group, if there is one."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_interrupt_in, error.exceptions)), None)
    return error if ends_program(error) else None
