"""What is printed, and when: each line immediately, and nothing that could steer a terminal."""

from __future__ import annotations

import errno
import os
import re
import select
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, TextIO

import anyio
from anyio import AsyncContextManagerMixin, create_task_group, to_thread

from ._arguments import NAME, CommandError

STEERING: Final = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What could steer a terminal, and lone surrogates, which no encoding has."""

_PIPE_BUF: Final = 4096
"""A pipe that may be written to takes so many bytes at once, on Linux; others take 512 at least."""


def visible(text: str) -> str:
    """Show what would steer a terminal instead of obeying it: others write the messages."""
    return STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a standard stream is a terminal; one that was closed is ``None``."""
    return stream is not None and stream.isatty()


def say(text: str, *, painted: str = "") -> None:
    """
    Print a line of the result immediately, because the reader of a pipe wants it when it happens.

    :param text: what could steer a terminal is made visible
    :param painted: goes before it as it is
    :raises CommandError: if standard output cannot be written to
    :raises BrokenPipeError: if the reader has left
    """
    stream = _stdout()
    line = f"{painted}{visible(text)}".encode(stream.encoding, "backslashreplace")
    with _writing():
        print(line.decode(stream.encoding), file=stream, flush=True)


def note(text: str) -> None:
    """Tell something beside the result, in one line on stderr, if that can be written to."""
    if sys.stderr is not None:
        try:
            print(f"{NAME}: {visible(text)}", file=sys.stderr, flush=True)
        except OSError:
            _discard(sys.stderr)


def hint(text: str) -> None:
    """Tell somebody at a terminal what a program does not want to know."""
    if is_terminal(sys.stderr):
        note(text)


def flush() -> None:
    """Write what argparse has printed, if standard output can be written to."""
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
    # Python flushes once more at exit, and must not fail then.
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


class Output(AsyncContextManagerMixin):
    """
    Standard output, for commands that print while the link goes on.

    A reader who is slow, as a pager is, must hold up nothing but what is to be printed: with the
    loop held up, the broker would hear nothing of us and close the link.

    The block ends with BrokenPipeError when the reader leaves, also while there is nothing to
    write.

    :raises CommandError: if standard output is closed
    """

    def __init__(self) -> None:
        stream = _stdout()
        self.terminal = is_terminal(stream)
        self._descriptor = stream.fileno()
        self._waits = True

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Output]:
        async with create_task_group() as tasks:
            tasks.start_soon(self._watch)
            yield self
            tasks.cancel_scope.cancel()

    async def _watch(self) -> None:
        # A terminal is readable when somebody types.
        if sys.platform != "win32" and not self.terminal:
            try:
                await anyio.wait_readable(self._descriptor)
            except (OSError, ValueError):
                return  # a file, which has no reader
            poll = select.poll()
            poll.register(self._descriptor, 0)  # errors and the end are always reported
            if poll.poll(0):
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    async def write(self, data: bytes) -> None:
        """
        Write what may be several lines.

        :raises CommandError: if standard output cannot be written to
        :raises BrokenPipeError: if the reader has left
        """
        with _writing():
            while data and await self._writable():
                data = data[os.write(self._descriptor, data[:_PIPE_BUF]) :]
            while data:
                data = data[await to_thread.run_sync(os.write, self._descriptor, data) :]

    async def _writable(self) -> bool:
        if self._waits:
            try:
                await anyio.wait_writable(self._descriptor)
            except (OSError, ValueError):
                # A file, for which nothing need be waited; or Windows, where nothing can be.
                self._waits = False
        return self._waits
