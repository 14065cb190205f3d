"""What is read from standard input, while the link goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from functools import partial
from typing import Final

import anyio
from anyio import to_thread

_CHUNK: Final = 65536


async def chunks() -> AsyncIterator[bytes]:
    """Give the bytes of standard input as they come."""
    descriptor = sys.stdin.fileno()
    waits = True
    while True:
        if waits:
            try:
                await anyio.wait_readable(descriptor)
            except (OSError, ValueError):
                # A file, for which nothing need be waited; or Windows, where nothing can be.
                waits = False
        # In a thread only then: one that waits for a terminal would outlive us.
        read = partial(os.read, descriptor, _CHUNK)
        data = read() if waits else await to_thread.run_sync(read, abandon_on_cancel=True)
        if not data:
            return
        yield data


async def lines() -> AsyncIterator[bytes]:
    """Give the lines of standard input as they come, without their ends."""
    rest = b""
    async for data in chunks():
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line
    if rest:
        yield rest
