"""Detection of the current backend."""

from __future__ import annotations

import asyncio
import sys

from .asyncio import AsyncioBackend
from .interface import Backend


def current_backend() -> Backend:
    """
    Return the backend that runs the calling code.

    :raises RuntimeError: if no event loop is running
    """
    trio = sys.modules.get("trio")
    # Check Trio first, because in guest mode an asyncio loop is also running.
    if trio is not None and trio.lowlevel.in_trio_task():
        # Import it only if it runs, because importing Trio takes 0.1 seconds.
        from .trio import TrioBackend

        return TrioBackend()
    return AsyncioBackend(asyncio.get_running_loop())
