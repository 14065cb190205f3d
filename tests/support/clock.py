"""Blocking the event loop in virtual time."""

from __future__ import annotations

import asyncio

import sniffio
import trio.testing

from emitter_anyio.testing import VirtualTimeLoop


def simulate_blocking(seconds: float) -> None:
    """Advance virtual time as if the caller had blocked the event loop."""
    if sniffio.current_async_library() == "trio":
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        clock.jump(seconds)
    else:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        loop.jump(seconds)
