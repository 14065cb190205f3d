"""Python programs as a user runs them: each in a process, its output in pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
from anyio.abc import Process

ROOT = Path(__file__).parent.parent.parent

# Neither with -X dev nor with PYTHONASYNCIODEBUG: asyncio would tell on stderr which steps took
# long on a loaded machine.
_PYTHON = (sys.executable, "-W", "error")


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        # Without a buffer, nobody would see that a line has not been flushed.
        if not name.startswith("EMITTER_")
        and name not in ("PYTHONASYNCIODEBUG", "PYTHONUNBUFFERED")
    }
    return {**inherited, **(more or {})}


def start(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """
    Start Python on something of this checkout; a warning is an error there.

    :param arguments: what follows ``python``
    :param environment: variables besides the usual ones; no broker is named unless here
    """
    return subprocess.Popen(
        [*_PYTHON, *arguments],
        cwd=ROOT,
        env=_environment(environment),
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


@asynccontextmanager
async def open_process(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Process]:
    """Do what :func:`running` does, with the pipes of AnyIO; what comes on stderr is passed on."""
    async with await anyio.open_process(
        [*_PYTHON, *arguments],
        stderr=None,
        cwd=ROOT,
        env=_environment(environment),
    ) as process:
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
