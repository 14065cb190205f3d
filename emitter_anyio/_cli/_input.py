"""Reading standard input without blocking the event loop."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Final

import anyio
from anyio import to_thread

from ._arguments import CommandError

_CHUNK_BYTES: Final = 65536


async def chunks() -> AsyncGenerator[bytes]:
    """
    Yield the bytes of standard input as they arrive.

    :raises CommandError: if it cannot be read
    """
    if sys.stdin is None:
        raise CommandError("cannot read standard input: it is closed")
    descriptor = sys.stdin.fileno()
    pollable = True
    while True:
        if pollable:
            try:
                await anyio.wait_readable(descriptor)
            except (OSError, ValueError):
                # A regular file, or a pipe on Windows.
                pollable = False
        read = partial(os.read, descriptor, _CHUNK_BYTES)
        # Use a thread only as a last resort: one that reads from a terminal cannot be cancelled.
        try:
            data = read() if pollable else await to_thread.run_sync(read, abandon_on_cancel=True)
        except OSError as exc:
            raise CommandError(f"cannot read standard input: {exc.strerror or exc}") from exc
        if not data:
            return
        yield data


async def lines() -> AsyncGenerator[bytes]:
    """Yield the lines of standard input as they arrive, without line breaks."""
    rest = b""
    async with aclosing(chunks()) as read:
        async for data in read:
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield line
    if rest:
        yield rest
