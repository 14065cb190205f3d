"""Printing each line immediately, with control characters made visible."""

from __future__ import annotations

import errno
import os
import re
import select
import stat
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, TextIO

import anyio
from anyio import AsyncContextManagerMixin, create_task_group, to_thread

from ._arguments import NAME, CommandError

CONTROL_CHARACTERS: Final = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that a terminal might act on, and lone surrogates, which cannot be encoded."""

_MAX_PIPE_WRITE_BYTES: Final = 4096
"""The bytes that a writable pipe accepts without blocking on Linux (elsewhere at least 512)."""


def visible(text: str) -> str:
    """Escape control characters, because other clients write the messages."""
    return CONTROL_CHARACTERS.sub(lambda found: ascii(found[0])[1:-1], text)


def visible_text(text: str) -> str:
    """Escape control characters except line breaks and tabs."""
    return re.sub(r"[^\n\t]+", lambda found: visible(found[0]), text)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a standard stream, ``None`` if it was closed, is a terminal."""
    return stream is not None and stream.isatty()


def print_line(text: str, *, styled: str = "") -> None:
    """
    Print a line to standard output and flush it, for the reader of a pipe.

    :param text: the line; control characters are escaped
    :param styled: text to print before it, with escape sequences
    :raises CommandError: if standard output cannot be written to
    :raises BrokenPipeError: if the reader has closed the pipe
    """
    stream = _stdout()
    line = f"{styled}{visible(text)}".encode(stream.encoding, "backslashreplace")
    with _writing():
        print(line.decode(stream.encoding), file=stream, flush=True)


def note(text: str) -> None:
    """Print a note or an error to stderr in one line, unless stderr cannot be written to."""
    if sys.stderr is not None:
        try:
            print(f"{NAME}: {visible(text)}", file=sys.stderr, flush=True)
        except OSError:
            _discard(sys.stderr)


def hint(text: str) -> None:
    """Print a note if stderr is a terminal."""
    if is_terminal(sys.stderr):
        note(text)


def flush() -> None:
    """Flush standard output, unless it cannot be written to."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:
            _discard(sys.stdout)


def _stdout() -> TextIO:
    if sys.stdout is None:
        raise CommandError("cannot write to standard output: it is closed")
    return sys.stdout


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        _discard(_stdout())
        if isinstance(exc, BrokenPipeError):
            raise
        raise CommandError(f"cannot write to standard output: {exc.strerror or exc}") from exc


def _discard(stream: TextIO) -> None:
    # Python flushes the stream again at exit, which would print another error.
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)


def _ends_within_line(descriptor: int) -> bool:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or not found.st_size:
        return False
    try:
        with open(f"/dev/fd/{descriptor}", "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    except OSError:
        return False  # not every system can read from a descriptor that was opened for writing


def _sync_file(descriptor: int) -> None:
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.fsync(descriptor)


class Output(AsyncContextManagerMixin):
    """
    Standard output, for commands that stay connected while they print.

    A slow reader, such as a pager, delays only the writes. If it blocked the event loop, the client
    would send no pings and the broker would close the connection.

    The block raises BrokenPipeError when the reader closes the pipe, even between two writes.

    :raises CommandError: if standard output is closed
    """

    def __init__(self) -> None:
        stream = _stdout()
        self.terminal = is_terminal(stream)
        self._descriptor = stream.fileno()
        self._pollable = True

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Output]:
        async with create_task_group() as tasks:
            tasks.start_soon(self._watch_reader)
            yield self
            tasks.cancel_scope.cancel()

    async def _watch_reader(self) -> None:
        # A terminal becomes readable when the user types.
        if sys.platform != "win32" and not self.terminal:
            try:
                await anyio.wait_readable(self._descriptor)
            except (OSError, ValueError):
                return  # a regular file
            poll = select.poll()
            poll.register(self._descriptor, 0)  # poll always reports errors and hang-up
            if poll.poll(0):
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    async def write(self, data: bytes) -> None:
        """
        Write one or more lines.

        :raises CommandError: if standard output cannot be written to
        :raises BrokenPipeError: if the reader has closed the pipe
        """
        with _writing():
            while data and await self._wait_writable():
                data = data[os.write(self._descriptor, data[:_MAX_PIPE_WRITE_BYTES]) :]
            while data:
                data = data[await to_thread.run_sync(os.write, self._descriptor, data) :]

    async def end_line(self) -> None:
        """
        End the last line if standard output is a file that ends within a line.

        A process that was killed while it wrote to the file leaves such a line.

        :raises CommandError: if standard output cannot be written to
        """
        if await to_thread.run_sync(_ends_within_line, self._descriptor):
            await self.write(b"\n")

    async def sync(self) -> None:
        """
        Wait until everything that was written is on the disk, if standard output is a file.

        :raises CommandError: if the disk reports an error
        """
        with _writing():
            await to_thread.run_sync(_sync_file, self._descriptor)

    async def _wait_writable(self) -> bool:
        """Wait until a write does not block, and return whether that is known."""
        if self._pollable:
            try:
                await anyio.wait_writable(self._descriptor)
            except (OSError, ValueError):
                # A regular file, or a pipe on Windows.
                self._pollable = False
        return self._pollable
