"""Reading standard input or a file without blocking the event loop."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Final

import anyio
from anyio import to_thread

from ._arguments import CommandError

STDIN: Final = "-"
"""The name of standard input, where the name of a file is expected."""

_CHUNK_BYTES: Final = 65536


async def chunks(name: str = STDIN) -> AsyncGenerator[bytes]:
    """
    Yield the bytes of a file or of standard input as they arrive.

    :raises CommandError: if it cannot be read
    """
    try:
        descriptor = _stdin() if name == STDIN else await to_thread.run_sync(_open, name)
    except OSError as exc:
        raise _unreadable(name, exc) from exc
    try:
        pollable, is_stdin = True, name == STDIN
        while True:
            if pollable:
                try:
                    await anyio.wait_readable(descriptor)
                except (OSError, ValueError):
                    # A regular file, or a pipe on Windows.
                    pollable = False
            read = partial(os.read, descriptor, _CHUNK_BYTES)
            # Use a thread only as a last resort: one that reads from a terminal cannot be
            # cancelled.
            try:
                if pollable:
                    data = read()
                else:
                    data = await to_thread.run_sync(read, abandon_on_cancel=is_stdin)
            except OSError as exc:
                raise _unreadable(name, exc) from exc
            if not data:
                return
            yield data
    finally:
        if not is_stdin:
            os.close(descriptor)


async def lines(name: str = STDIN) -> AsyncGenerator[bytes]:
    """Yield the lines of a file or of standard input as they arrive, without line breaks."""
    rest = b""
    async with aclosing(chunks(name)) as read:
        async for data in read:
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield line
    if rest:
        yield rest


async def read_all(name: str) -> bytes:
    """Return the content of a file or of standard input."""
    async with aclosing(chunks(name)) as read:
        return b"".join([chunk async for chunk in read])


async def remaining_bytes(name: str) -> int:
    """Return how many bytes are left to read, or 0 unless it is a regular file."""
    return await to_thread.run_sync(_remaining_bytes, name)


def _remaining_bytes(name: str) -> int:
    try:
        if name != STDIN:
            found, position = os.stat(name), 0
        else:
            found = os.fstat(_stdin())
            position = os.lseek(_stdin(), 0, os.SEEK_CUR) if stat.S_ISREG(found.st_mode) else 0
    except (OSError, CommandError):
        return 0  # reading reports the error
    return found.st_size - position if stat.S_ISREG(found.st_mode) else 0


def _stdin() -> int:
    if sys.stdin is None:
        raise CommandError("cannot read standard input: it is closed")
    return sys.stdin.fileno()


def _open(name: str) -> int:
    return os.open(name, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def _unreadable(name: str, error: OSError) -> CommandError:
    label = "standard input" if name == STDIN else name
    return CommandError(f"cannot read {label}: {error.strerror or error}")
