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

# Without -X dev and PYTHONASYNCIODEBUG: asyncio would log slow steps to stderr on a busy machine.
_PYTHON = (sys.executable, "-W", "error")


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        # Remove PYTHONUNBUFFERED because it would hide a missing flush().
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
        env=_environment(environment),
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
    *arguments: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Process]:
    """Run a process as :func:`running` does, with AnyIO's pipes; stderr is inherited."""
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
