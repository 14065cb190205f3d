"""
Everything that differs between asyncio and Trio.

Only this package imports them. Each backend is one module with one class, which implements
:class:`Backend`.
"""

from __future__ import annotations

from ._asyncio import NativeCancelledError
from ._current import current_backend
from ._interface import CHUNK, Backend, LastHeard, Reader, Wakeup
from ._owner import Owner

__all__ = [
    "CHUNK",
    "Backend",
    "LastHeard",
    "NativeCancelledError",
    "Owner",
    "Reader",
    "Wakeup",
    "current_backend",
]
