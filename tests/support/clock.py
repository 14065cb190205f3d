"""
Virtual time on both backends, for tests over in-memory connections.

When every task waits, the clock jumps to the next deadline. A test turns it on with
``@pytest.mark.virtual_time``. The clock cannot see bytes in a socket or work in a thread, so it
would jump past them.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import sniffio
import trio.testing

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that advances its clock by the timeout instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:  # no deadline is pending: only an event can wake the loop
            return super().select(None)

        ready = super().select(0)
        if not ready and timeout > 0:
            # Go slightly past the deadline: asyncio runs timers up to a nanosecond early, but for
            # large times rounding removes this margin.
            self.now += timeout
            self.now += 4 * math.ulp(self.now)

        return ready


class JumpingEventLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop whose clock starts at 0 and jumps to the next deadline."""

    def __init__(self) -> None:
        # BaseEventLoop.__init__() calls time().
        self._virtual = _JumpingSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def jump(self, seconds: float) -> None:
        self._virtual.now += seconds


def simulate_blocking(seconds: float) -> None:
    """Advance virtual time as if the caller had blocked the event loop."""
    if sniffio.current_async_library() == "trio":
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        clock.jump(seconds)
    else:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, JumpingEventLoop)
        loop.jump(seconds)


def virtual_time_options(backend: str) -> dict[str, Any]:
    """Return the options of AnyIO's ``backend`` that turn on virtual time."""
    if backend == "trio":
        return {"clock": trio.testing.MockClock(autojump_threshold=0)}

    return {"loop_factory": JumpingEventLoop}


def run_on_virtual_time(backend: str, function: Callable[[], Awaitable[T]]) -> T:
    """Run a function in a new event loop with virtual time."""
    options = virtual_time_options(backend)
    if backend == "trio":
        # AnyIO up to 4.11 does not pass on the clock.
        return trio.run(function, **options)
    return anyio.run(function, backend=backend, backend_options=options)
