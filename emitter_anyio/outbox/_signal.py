"""A wake-up call for one task."""

from __future__ import annotations

import anyio
from anyio.lowlevel import checkpoint

from emitter_anyio._backend.tasks import is_cancelled


class Signal:
    """A flag for which one task waits; waiting clears it."""

    def __init__(self) -> None:
        self._is_set = False
        self._event: anyio.Event | None = None

    def set(self) -> None:
        """Wake the task, now or when it next waits."""
        self._is_set = True
        if self._event is not None:
            self._event.set()

    async def wait(self, seconds: float) -> bool:
        """
        Wait until the flag is set, and clear it.

        :param seconds: the longest time to wait
        :return: whether the task is to go on. In a task group that was never left, Trio's scopes
            catch cancellations that are not their own
        """
        if self._is_set:
            await checkpoint()
        else:
            self._event = anyio.Event()
            try:
                with anyio.move_on_after(seconds):
                    await self._event.wait()
            finally:
                self._event = None
        self._is_set = False
        return not is_cancelled()
