"""What goes on beside something, and ends with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from emitter_anyio._backend import current_backend


class Tasks:
    """
    A task group in which often there is nobody.

    Its tasks never raise: what one of them raises is reported, so that the block around them leaves
    with its own exception, and in no group.

    :param failed: is told what a task has raised; a ``CancelledError`` is by ``Task.cancel()``
    :ivar used: whether there has been anybody but those who end by themselves; if not, nobody is
        left who would have to be cancelled, and that costs, even so
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._group = anyio.create_task_group()
        self._host: object = None
        """The task that has opened the group, and has to close it."""
        self._scopes: set[anyio.CancelScope] = set()
        self._running = 0
        self._none_runs: anyio.Event | None = None
        self.used = False

    @property
    def hosted_here(self) -> bool:
        """Whether the calling task may close the group."""
        return self._host is current_backend().current_task()

    @property
    def host_ended(self) -> bool:
        """Whether nobody can close the group any more, and nobody has to."""
        return current_backend().has_ended(self._host)

    async def open(self) -> None:
        """Open the group in the calling task."""
        await self._group.__aenter__()
        self._host = current_backend().current_task()

    async def close(self) -> None:
        """
        Wait for all of them, in the task that has opened the group.

        :raises KeyboardInterrupt: if one struck where no task could report it
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
        """Start a task that ends by itself."""
        self._running += 1
        self._group.start_soon(self._run_counted, function, *arguments, name=name)

    def start_soon(
        self,
        function: Callable[..., Coroutine[Any, Any, None]],
        *arguments: object,
        name: object = None,
    ) -> None:
        """Start a task that nobody waits for."""
        self.used = True
        scope = anyio.CancelScope()
        self._scopes.add(scope)
        name = name or f"{function.__module__}.{function.__qualname__}"
        self.start(self._run_in_scope, scope, function, *arguments, name=name)

    async def run(
        self, function: Callable[..., Coroutine[Any, Any, None]], *arguments: object
    ) -> None:
        """Run a function as one of the tasks, and report what it raises."""
        try:
            await function(*arguments)
        except anyio.get_cancelled_exc_class() as exc:
            if is_cancelled():
                raise
            self._failed(exc)
        except BaseException as exc:
            self._failed(_interrupt_in(exc) or exc)

    def cancel(self) -> None:
        """Cancel all of them, and what the group is around."""
        self._group.cancel_scope.cancel()

    def stop(self) -> None:
        """Cancel those who do not end by themselves."""
        for scope in self._scopes:
            scope.cancel()

    async def stopped(self) -> None:
        """Wait for all of them, in any task."""
        if self._running:
            self._none_runs = anyio.Event()
            await self._none_runs.wait()

    async def _run_counted(
        self, function: Callable[..., Coroutine[Any, Any, None]], *arguments: object
    ) -> None:
        try:
            await self.run(function, *arguments)
        finally:
            self._running -= 1
            if self._none_runs is not None and not self._running:
                self._none_runs.set()

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
    Return whether the present task is cancelled by a scope.

    When a program ends without leaving a client, Trio cancels the client's tasks and gives them one
    turn. If one of them takes more, Trio raises ``TrioInternalError`` instead of showing the
    program's own exception.
    """
    return anyio.current_effective_deadline() == -math.inf


def ends_program(error: BaseException) -> bool:
    """Return whether an error ends the program."""
    return isinstance(error, KeyboardInterrupt | SystemExit)


def _interrupt_in(error: BaseException) -> BaseException | None:
    """Find what ends a program, in a group."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_interrupt_in, error.exceptions)), None)
    return error if ends_program(error) else None
