"""A pseudo-terminal: what a program shows on it, and what somebody types."""

from __future__ import annotations

import os
import pty
import re
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]|\r")


class Terminal:
    """
    One end of it is ours, the other one the program's.

    :ivar raw: all that was shown
    """

    def __init__(self) -> None:
        self._ours, self.theirs = pty.openpty()
        termios.tcsetwinsize(self.theirs, (40, 120))
        self.raw = b""
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._ours, 65536)
            except OSError:
                data = b""
            with self._news:
                self.raw += data
                self._news.notify_all()
            if not data:
                return

    @property
    def text(self) -> str:
        """What was shown, without what steers the terminal."""
        return _CONTROL.sub(b"", self.raw).decode()

    def wait_for(self, words: str) -> None:
        """Wait until these words have been shown."""
        with self._news:
            # Less than pytest waits, so that a failure shows what was shown instead.
            assert self._news.wait_for(lambda: words in self.text, timeout=240), self.text

    def type(self, data: bytes) -> None:
        os.write(self._ours, data)

    def close_theirs(self) -> None:
        """Wait until all was read that the program has shown."""
        os.close(self.theirs)
        self._reader.join()

    def close(self) -> None:
        os.close(self._ours)


@contextmanager
def terminal() -> Iterator[Terminal]:
    """Give a pseudo-terminal."""
    made = Terminal()
    try:
        yield made
    finally:
        made.close()


@contextmanager
def as_ours(made: Terminal) -> Iterator[None]:
    """Put a pseudo-terminal in the place of our own streams; at the end all of it is there."""
    before = sys.stdin, sys.stdout, sys.stderr
    with (
        open(os.dup(made.theirs)) as sys.stdin,
        open(os.dup(made.theirs), "w") as sys.stdout,
        open(os.dup(made.theirs), "w") as sys.stderr,
    ):
        try:
            yield
        finally:
            sys.stdin, sys.stdout, sys.stderr = before
    made.close_theirs()
