"""Virtual time: event loops whose clock jumps to the next deadline when every task waits."""

from __future__ import annotations

import asyncio
import math
import selectors
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal, TypeVar

import anyio

T = TypeVar("T")

_BACKENDS: Final = ("asyncio", "trio")


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that advances its clock by the timeout instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    @property
    def now(self) -> float:
        return self._now

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:  # no deadline is pending: only an event can wake the loop
            return super().select(None)
        ready = super().select(0)
        if not ready and timeout > 0:
            self.jump(timeout)
        return ready

    def jump(self, seconds: float) -> None:
        self._now += seconds
        # Go slightly past the deadline: asyncio runs timers up to a nanosecond early, but for
        # large times rounding removes this margin.
        self._now += 4 * math.ulp(self._now)


class _EventLoop(asyncio.SelectorEventLoop):
    """An event loop that looks up addresses without a thread, which the clock would jump past."""

    async def getaddrinfo(self, *args: Any, **kwargs: Any) -> Any:
        return socket.getaddrinfo(*args, **kwargs)


class VirtualTimeLoop(_EventLoop):
    """
    An asyncio event loop whose clock starts at 0, and jumps to the next deadline when every task
    waits.

    It is Trio's ``MockClock(autojump_threshold=0)`` for asyncio. Pass it to asyncio as a loop
    factory, for example as ``asyncio.Runner(loop_factory=VirtualTimeLoop)``.
    """

    def __init__(self) -> None:
        # BaseEventLoop.__init__() calls time().
        self._virtual = _JumpingSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._virtual.now

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        # The clock would jump to the end of the timeout while a thread is still working.
        await super().shutdown_default_executor()

    def jump(self, seconds: float) -> None:
        """
        Advance the clock as if the caller had blocked the event loop.

        :param seconds: the seconds to advance by, at least 0
        :raises ValueError: if ``seconds`` is negative
        """
        if seconds < 0:
            raise ValueError(f"invalid seconds: expected at least 0, got {seconds:g}")
        self._virtual.jump(seconds)


def virtual_backend(name: Literal["asyncio", "trio"]) -> tuple[str, dict[str, object]]:
    """
    Return a backend of AnyIO with virtual time, as a value for the fixture ``anyio_backend``.

    :param name: ``"asyncio"`` or ``"trio"``
    :return: the name and the options of the backend
    :raises ValueError: if there is no such backend
    """
    if name not in _BACKENDS:
        raise ValueError(f"invalid backend {name!r}: expected one of {', '.join(_BACKENDS)}")
    if name == "asyncio":
        return name, {"loop_factory": VirtualTimeLoop}
    from trio.testing import MockClock

    return name, {"clock": MockClock(autojump_threshold=0)}


def run_virtual(
    function: Callable[..., Awaitable[T]],
    *args: object,
    backend: Literal["asyncio", "trio"] = "asyncio",
) -> T:
    """
    Run an asynchronous function in a new event loop with virtual time.

    The clock starts at 0. When every task waits, it jumps to the next deadline, so that sleeping
    for an hour takes no time.

    :param function: the function
    :param args: its arguments
    :param backend: ``"asyncio"`` or ``"trio"``
    :return: what the function returns
    :raises ValueError: if there is no such backend
    :raises RuntimeError: if called in a running event loop
    """
    name, options = virtual_backend(backend)
    if name == "trio":
        import trio
        from trio.testing import MockClock

        # AnyIO 4.11 does not pass on the clock.
        return trio.run(function, *args, clock=MockClock(autojump_threshold=0))
    return anyio.run(function, *args, backend=name, backend_options=options)


def virtual_clock() -> Callable[[], float] | None:
    """Return the clock of the running event loop if it is virtual, or ``None``."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        # Importing this module takes 50 ms. The clock is real if it has not been imported.
        if "trio.testing" not in sys.modules:
            return None
        from trio.lowlevel import current_clock
        from trio.testing import MockClock

        clock = current_clock()
        return clock.current_time if isinstance(clock, MockClock) else None
    return loop.time if isinstance(loop, VirtualTimeLoop) else None
