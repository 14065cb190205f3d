"""Which backend runs the calling code."""

from __future__ import annotations

import asyncio
import sys

from .asyncio import AsyncioBackend
from .interface import Backend


def current_backend() -> Backend:
    """
    Return the backend that runs the calling code.

    :raises RuntimeError: outside of an event loop
    """
    trio = sys.modules.get("trio")
    # In guest mode, a loop of asyncio runs around Trio.
    if trio is not None and trio.lowlevel.in_trio_task():
        # Importing Trio takes a tenth of a second, which programs on asyncio are spared.
        from .trio import TrioBackend

        return TrioBackend()
    return AsyncioBackend(asyncio.get_running_loop())
