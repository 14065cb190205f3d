"""Virtual time on both backends, for tests over in-memory links only.

Nothing here waits: as soon as every task waits for something, the clock jumps to the next deadline.
A test asks for it with ``@pytest.mark.virtual_time``. Bytes in a socket and work in a thread are
invisible to such a clock: it would jump past them.
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
    """A selector that, instead of waiting for a timeout, lets the time pass at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:  # nothing has a deadline, so only an event can wake the loop
            return super().select(None)

        ready = super().select(0)
        if not ready and timeout > 0:
            # A hair beyond the deadline: the loop runs only what lies before now, and far from 0
            # its own allowance for that, a nanosecond, is lost in rounding.
            self.now += timeout
            self.now += 4 * math.ulp(self.now)

        return ready


class JumpingEventLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop whose clock starts at 0 and jumps to the next deadline."""

    def __init__(self) -> None:
        # The loop asks for the time while it is being made.
        self._virtual = _JumpingSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def jump(self, seconds: float) -> None:
        self._virtual.now += seconds


def stand_still(seconds: float) -> None:
    """Let virtual time pass as if the caller had blocked the loop."""
    if sniffio.current_async_library() == "trio":
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        clock.jump(seconds)
    else:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, JumpingEventLoop)
        loop.jump(seconds)


def virtual_time_options(backend: str) -> dict[str, Any]:
    """What the fixture ``anyio_backend`` returns beside ``backend``, for virtual time."""
    if backend == "trio":
        return {"clock": trio.testing.MockClock(autojump_threshold=0)}

    return {"loop_factory": JumpingEventLoop}


def run_on_virtual_time(backend: str, function: Callable[[], Awaitable[T]]) -> T:
    """Run a function in an event loop of its own, on virtual time."""
    options = virtual_time_options(backend)
    if backend == "trio":
        # AnyIO up to 4.11 does not pass the clock on.
        return trio.run(function, **options)
    return anyio.run(function, backend=backend, backend_options=options)
