"""Python programs as a user runs them: each in a process, its output in pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def start(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """
    Start Python on something of this checkout; a warning is an error there.

    :param arguments: what follows ``python``
    :param environment: variables besides the usual ones; no broker is named unless here
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        # Without a buffer, nobody would see that a line has not been flushed.
        if not name.startswith("EMITTER_") and name != "PYTHONUNBUFFERED"
    }
    return subprocess.Popen(
        # Not with -X dev: asyncio would tell on stderr which steps took long on a loaded machine.
        [sys.executable, "-W", "error", *arguments],
        cwd=ROOT,
        env={**inherited, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Do what :func:`start` does, and wait for the end."""
    with running(*arguments, environment=environment) as process:
        output, errors = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


@contextmanager
def running(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Do what :func:`start` does; what is still running at the end of the block is killed."""
    with start(*arguments, environment=environment) as process:
        try:
            yield process
        finally:
            process.kill()
