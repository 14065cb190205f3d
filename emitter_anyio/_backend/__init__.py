"""
The differences between asyncio and Trio.

Only this package imports them. Each backend is a module with a class that implements
:class:`Backend`.
"""

from __future__ import annotations

from .asyncio import NativeCancelledError
from .current import current_backend
from .interface import READ_CHUNK_BYTES, Backend, LastHeard, Reader, Wakeup
from .owner import Owner

__all__ = [
    "READ_CHUNK_BYTES",
    "Backend",
    "LastHeard",
    "NativeCancelledError",
    "Owner",
    "Reader",
    "Wakeup",
    "current_backend",
]
