"""Run Python programs as a user does: each in a process, with its output in pipes."""

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

_PYTHON = (sys.executable, "-W", "error")


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """
    Return the environment of this process without what would change the output of another one.

    :param more: variables to add
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        # On a busy machine, asyncio's debug mode logs slow steps to stderr, also with -X dev.
        # PYTHONUNBUFFERED would hide a missing flush().
        if not name.startswith("EMITTER_")
        and name not in ("PYTHONASYNCIODEBUG", "PYTHONUNBUFFERED")
    }
    return {**inherited, **(more or {})}


def start(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """
    Start Python in this checkout, with warnings as errors.

    :param arguments: what follows ``python``
    :param environment: additional variables; variables that start with ``EMITTER_`` are not
        inherited
    """
    return subprocess.Popen(
        [*_PYTHON, *arguments],
        cwd=ROOT,
        env=clean_environment(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a process as :func:`start` does, and wait until it ends."""
    with running(*arguments, environment=environment) as process:
        output, errors = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


@contextmanager
def running(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a process as :func:`start` does, and kill it when the block ends."""
    with start(*arguments, environment=environment) as process:
        try:
            yield process
        finally:
            process.kill()


@asynccontextmanager
async def open_process(
    *arguments: str, environment: Mapping[str, str] | None = None, stderr: int | None = None
) -> AsyncIterator[Process]:
    """Run a process as :func:`running` does, with AnyIO's pipes; stderr is inherited by default."""
    async with await anyio.open_process(
        [*_PYTHON, *arguments],
        stderr=stderr,
        cwd=ROOT,
        env=clean_environment(environment),
    ) as process:
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
