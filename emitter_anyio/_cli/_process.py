"""Running a program for each request: the payload on standard input, the reply from its output."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from subprocess import PIPE
from typing import Final

import anyio
from anyio import BrokenResourceError, ClosedResourceError, create_task_group
from anyio.abc import ByteReceiveStream, ByteSendStream, Process

from ._arguments import MAX_MESSAGE_BYTES
from ._output import note

_MAX_LINE_BYTES: Final = 1024
"""The size above which a line of standard error is printed before it ends."""

_DRAIN_SECONDS: Final = 1.0
"""The time in which the output of a killed process must end."""


class ProgramError(Exception):
    """A failure of the program. The requester gets the name of this class with the message."""


class Program:
    """
    A program to run for each request.

    :param command: its name and arguments, or a line for the shell
    :param timeout: the number of seconds after which a process is killed
    :param secrets: texts that its standard error must not reveal
    """

    def __init__(
        self, command: str | Sequence[str], timeout: float, secrets: Sequence[str]
    ) -> None:
        self._command = command
        self._timeout = timeout
        self._secrets = secrets
        # The program reads untrusted input, so it gets no keys and passwords.
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith("EMITTER_")
        }

    async def run(self, payload: bytes) -> bytes:
        """
        Run the program, and return what it writes to standard output.

        If this is cancelled, the process and its child processes are killed.

        :param payload: what the program reads from standard input
        :raises ProgramError: if the program fails; with the last line of its standard error
        """
        with anyio.move_on_after(self._timeout):
            return await self._run(payload)
        raise ProgramError(f"the program was killed after {self._timeout:g} s")

    async def _open(self) -> Process:
        try:
            return await anyio.open_process(
                self._command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env=self._environment,
                start_new_session=True,  # makes the process the leader of a process group
            )
        except OSError as exc:
            raise ProgramError(f"cannot run the program: {exc.strerror or exc}") from exc

    async def _run(self, payload: bytes) -> bytes:
        # If opening the process were cancelled, only the process itself would be killed.
        process: Process | None = None
        with anyio.CancelScope(shield=True):
            process = await self._open()
        assert process is not None
        async with process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            reply = bytearray()
            errors = _ErrorLines(self._secrets)
            try:
                async with create_task_group() as tasks:
                    tasks.start_soon(_write, process.stdin, payload)
                    tasks.start_soon(errors.read, process.stderr)
                    async for data in process.stdout:
                        reply += data
                        if len(reply) > MAX_MESSAGE_BYTES:
                            tasks.cancel_scope.cancel()
                            break
                if len(reply) <= MAX_MESSAGE_BYTES:
                    await process.wait()
            finally:
                _kill_group(process)
                await _drain(process.stdout, process.stderr)
        if len(reply) > MAX_MESSAGE_BYTES:
            raise ProgramError(f"the reply has more than {MAX_MESSAGE_BYTES:,} bytes")
        if process.returncode:
            code = process.returncode
            reason = f"exit status {code}" if code > 0 else f"killed by signal {-code}"
            raise ProgramError(f"{reason}: {errors.last}" if errors.last else reason)
        return bytes(reply)


async def _write(stdin: ByteSendStream, payload: bytes) -> None:
    # The program does not have to read its input.
    with suppress(OSError, BrokenResourceError, ClosedResourceError):
        await stdin.send(payload)
    await stdin.aclose()


class _ErrorLines:
    """
    The standard error of a process, which is printed line by line.

    :param secrets: texts to leave out
    :ivar last: the last line that is not empty
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        self.last = ""
        self._secrets = secrets

    async def read(self, stderr: ByteReceiveStream) -> None:
        """Print all lines."""
        rest = b""
        async for data in stderr:
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""  # bound the memory
            for line in lines:
                self._print(line)
        self._print(rest)

    def _print(self, line: bytes) -> None:
        if text := line.decode(errors="replace").strip():
            for secret in self._secrets:
                text = text.replace(secret, "…")
            self.last = text
            note(text)


async def _drain(*outputs: ByteReceiveStream) -> None:
    # Before AnyIO 4.15, a process on asyncio never closes while much of its output is unread.
    # A program that has left the process group might keep its output open, so do not wait long.
    with anyio.move_on_after(_DRAIN_SECONDS, shield=True):
        for output in outputs:
            async for _ in output:
                pass


def _kill_group(process: Process) -> None:
    """Kill a process and the child processes that it has left behind."""
    with suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":  # pragma: no cover - no process groups
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
