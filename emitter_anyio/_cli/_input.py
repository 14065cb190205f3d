"""What is read from standard input, while the link goes on."""

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

_CHUNK: Final = 65536


async def chunks() -> AsyncGenerator[bytes]:
    """
    Give the bytes of standard input as they come.

    :raises CommandError: if it cannot be read
    """
    if sys.stdin is None:
        raise CommandError("cannot read standard input: it is closed")
    descriptor = sys.stdin.fileno()
    waits = True
    while True:
        if waits:
            try:
                await anyio.wait_readable(descriptor)
            except (OSError, ValueError):
                # A file, for which nothing need be waited; or Windows, where nothing can be.
                waits = False
        read = partial(os.read, descriptor, _CHUNK)
        # Not in a thread where one can wait: one that reads from a terminal would outlive us.
        try:
            data = read() if waits else await to_thread.run_sync(read, abandon_on_cancel=True)
        except OSError as exc:
            raise CommandError(f"cannot read standard input: {exc.strerror or exc}") from exc
        if not data:
            return
        yield data


async def lines() -> AsyncGenerator[bytes]:
    """Give the lines of standard input as they come, without their ends."""
    rest = b""
    async with aclosing(chunks()) as read:
        async for data in read:
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield line
    if rest:
        yield rest
