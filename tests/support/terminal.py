"""A pseudo-terminal, for programs that behave differently on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.command import ROOT, clean_environment

_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]|\r")


class Terminal:
    """
    A pseudo-terminal whose output is collected in a thread.

    :ivar program_fd: the end for the program
    :ivar raw: the output so far
    """

    def __init__(self) -> None:
        self._fd, self.program_fd = pty.openpty()
        termios.tcsetwinsize(self.program_fd, (40, 120))
        self.raw = b""
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._fd, 65536)
            except OSError:
                data = b""
            with self._changed:
                self.raw += data
                self._changed.notify_all()
            if not data:
                return

    @property
    def text(self) -> str:
        """The output without control sequences."""
        return _CONTROL.sub(b"", self.raw).decode()

    def wait_for(self, words: str) -> None:
        """Wait until the output contains these words."""
        with self._changed:
            # Less than pytest's timeout, so that the failure shows the output.
            assert self._changed.wait_for(lambda: words in self.text, timeout=240), self.text

    def type(self, data: bytes) -> None:
        os.write(self._fd, data)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """
        Run Python on this terminal, in a separate session and in the root of the project.

        :param arguments: the arguments of Python
        :param environment: variables to add to a clean environment
        """
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=clean_environment(environment),
            stdin=self.program_fd,
            stdout=self.program_fd,
            stderr=self.program_fd,
            start_new_session=True,
        )

    def close_program_side(self) -> None:
        """Close the program's end and wait until all output has been read."""
        os.close(self.program_fd)
        self._reader.join()

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def terminal() -> Iterator[Terminal]:
    """Open a pseudo-terminal."""
    terminal = Terminal()
    try:
        yield terminal
    finally:
        terminal.close()


@contextmanager
def standard_streams_on(terminal: Terminal) -> Iterator[None]:
    """Redirect this process's standard streams to a terminal, and at the end read all output."""
    before = sys.stdin, sys.stdout, sys.stderr
    with (
        open(os.dup(terminal.program_fd)) as sys.stdin,
        open(os.dup(terminal.program_fd), "w") as sys.stdout,
        open(os.dup(terminal.program_fd), "w") as sys.stderr,
    ):
        try:
            yield
        finally:
            sys.stdin, sys.stdout, sys.stderr = before
    terminal.close_program_side()
