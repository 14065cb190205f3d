"""What wakes one timer on Trio, as asyncio's loop does itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio


class AlarmWaker:
    """
    Wakes one timer, in a task that sleeps until the next time.

    :param wake: is called then, and raises nothing
    :param start: starts the task, which ends when it is stopped
    """

    def __init__(self, wake: Callable[[], None], start: Callable[..., object]) -> None:
        self._wake = wake
        self._when = math.inf
        """When to wake it; before everything else once it is stopped."""
        self._scope = trio.CancelScope()
        """In which the task sleeps; what is done to it while the task is awake is void."""
        start(self._run, name="emitter_anyio timer")

    def set(self, when: float) -> None:
        """Wake it then, and not at the time that it was set to."""
        self._when = self._scope.deadline = when

    def stop(self) -> None:
        """Wake it no more."""
        self._when = -math.inf
        self._scope.cancel()

    async def _run(self) -> None:
        # In a nursery that was left open, the scope catches a cancellation that is not its own.
        while self._when > -math.inf and trio.current_effective_deadline() > -math.inf:
            with trio.CancelScope(deadline=self._when) as self._scope:
                await trio.sleep_forever()
            if self._when > -math.inf:
                self._when = math.inf
                self._wake()
