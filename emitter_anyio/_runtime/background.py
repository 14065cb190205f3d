"""The tasks of a client, and the error that ends it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from emitter_anyio._backend.tasks import Tasks, ends_program


class Background:
    """
    The task group of a client while it is entered, and the cancel scope of the block.

    Tasks never raise into the task group. The error of a task is recorded here and cancels the
    block, so that leaving the block raises the same object and not an exception group.
    """

    def __init__(self) -> None:
        self._tasks: Tasks | None = None
        self._block: anyio.CancelScope | None = None
        self._leave: Callable[[], None] | None = None
        self.failure: BaseException | None = None
        """The error that ends the client, if there is one."""

    @property
    def entered(self) -> bool:
        """Whether the client is entered."""
        return self._tasks is not None

    @property
    def tasks(self) -> Tasks:
        """The tasks of the client, which must be entered."""
        assert self._tasks is not None
        return self._tasks

    @property
    def block_cancelled(self) -> bool:
        """Whether the client has cancelled the block."""
        return self._block is not None and self._block.cancel_called

    async def open(
        self, failed: Callable[[BaseException], None], leave: Callable[[], None]
    ) -> None:
        """
        Open the task group and the block's cancel scope in the task that enters the client.

        :param failed: called with the exception of a task
        :param leave: called instead of cancelling the block if its task has ended, as with
            fixtures of pytest-asyncio and unittest
        """
        self.failure = None
        self._leave = leave
        tasks = Tasks(failed)
        await tasks.open()
        self._tasks = tasks
        self._block = anyio.CancelScope()
        self._block.__enter__()

    def leave_block(self, exc: BaseException | None) -> BaseException | None:
        """Leave the block's cancel scope; return the exception that is left of the block's one."""
        assert self._block is not None
        exc_type = None if exc is None else type(exc)
        try:
            return None if self._block.__exit__(exc_type, exc, None) else exc
        except BaseException as remaining:
            return remaining

    def cancel(self) -> None:
        """Cancel all tasks."""
        self.tasks.cancel()

    def cancel_block(self) -> None:
        """Cancel the block."""
        assert self._block is not None
        assert self._leave is not None
        if self.tasks.host_ended:
            self._leave()
        else:
            self._block.cancel()

    def fail(self, error: BaseException) -> None:
        """End the client with an error. Of several errors, the gravest one is kept."""
        self.failure = gravest(self.failure, error)
        self.cancel_block()

    def close(self) -> None:
        """Record that all tasks have ended."""
        self._tasks = None

    def start(
        self,
        function: Callable[..., Coroutine[Any, Any, None]],
        *arguments: object,
        name: object = None,
    ) -> None:
        """Start a task that leaving does not cancel, because it ends by itself."""
        self.tasks.start(function, *arguments, name=name)

    def start_soon(
        self,
        function: Callable[..., Coroutine[Any, Any, None]],
        *arguments: object,
        name: object = None,
    ) -> anyio.CancelScope:
        """Start a task that leaving cancels; return its cancel scope."""
        return self.tasks.start_soon(function, *arguments, name=name)

    async def run(
        self, function: Callable[..., Coroutine[Any, Any, None]], *arguments: object
    ) -> None:
        """Run a function in another task group, and treat its errors like those of these tasks."""
        await self.tasks.run(function, *arguments)


def gravest(first: BaseException | None, second: BaseException) -> BaseException:
    """Return the first error, unless only the second one ends the program."""
    if first is None or (ends_program(second) and not ends_program(first)):
        return second
    return first
