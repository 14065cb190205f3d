"""What is printed, and when: each line at once, and nothing on a terminal that could steer it."""

from __future__ import annotations

import os
import re
import sys
from typing import Final

import anyio
from anyio import to_thread

from ._arguments import NAME

_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

_PIPE_BUF: Final = 4096
"""A pipe that may be written to takes so many bytes at once, on Linux; others take 512 at least."""


def visible(text: str) -> str:
    """Show what would steer a terminal instead of obeying it: others write the messages."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: str) -> None:
    """Print a line of the result; who reads us through a pipe wants it when it happens."""
    print(text, flush=True)


def note(text: str) -> None:
    """Tell something beside the result, in one line on stderr."""
    print(f"{NAME}: {visible(text)}", file=sys.stderr, flush=True)


def hint(text: str) -> None:
    """Tell somebody at a terminal what a program does not want to know."""
    if sys.stderr.isatty():
        note(text)


class Output:
    """
    Standard output, for commands that print while the link goes on.

    A reader who is slow, as a pager is, must hold up nothing but what is to be printed: with the
    loop held up, the broker would hear nothing of us and close the link.
    """

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self._descriptor = sys.stdout.fileno()
        self._waits = True

    async def write(self, data: bytes) -> None:
        """
        Write what may be several lines.

        :raises BrokenPipeError: if the reader has left
        """
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
