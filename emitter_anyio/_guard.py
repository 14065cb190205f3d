"""User code in the client's tasks: whose a cancellation is that comes out of it."""

from __future__ import annotations

import asyncio

import anyio

from ._backend import asyncio_loop


class Guard:
    """
    Tells what user code has raised from a cancellation of the task that awaits it.

    On asyncio, awaiting a task or a future that something else has cancelled raises a
    ``CancelledError``, too. Made before the user code is called.
    """

    def __init__(self) -> None:
        self._task = None if asyncio_loop() is None else asyncio.current_task()
        self._before = 0 if self._task is None else self._task.cancelling()

    def is_of_user(self, error: BaseException) -> bool:
        """Tell whether an error is the user code's; if not, it is to be raised again."""
        if self._task is None or not isinstance(error, asyncio.CancelledError):
            return isinstance(error, Exception)
        return (
            self._task.cancelling() <= self._before
            and anyio.current_effective_deadline() > anyio.current_time()
        )
