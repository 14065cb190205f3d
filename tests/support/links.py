"""Clients of one link: what a lost link does to whom it was everything."""

from __future__ import annotations

from typing import Any

from emitter_anyio import Emitter, connect


def one_link(*args: Any, **options: Any) -> Emitter:
    """``connect()`` with ``reconnect=None``."""
    return connect(*args, reconnect=None, **options)
