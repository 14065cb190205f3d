"""Running a command until it ends or a signal arrives, and its exit code."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Final

import anyio
from anyio import TASK_STATUS_IGNORED, create_task_group, open_signal_receiver
from anyio.abc import TaskStatus

from emitter_anyio import EmitterError, NotFoundError, RequestError, UnauthorizedError

from ._arguments import CommandError, ReportedError, UsageError
from ._commands import make_parser
from ._output import flush, note

# The exit codes that a shell reports for a process ended by these signals. Windows has no SIGPIPE.
_SIGNAL_CODE: Final = 128
_BROKEN_PIPE: Final = _SIGNAL_CODE + 13

_HANDLED: Final = (
    *(KeyboardInterrupt, BrokenPipeError, UsageError, ReportedError, CommandError, EmitterError),
)
"""The exceptions that set an exit code. The first kind takes precedence."""

_OPTIONS: Final = {
    "load one with ssl_context.load_cert_chain()": "use --client-cert FILE",
    "use ssl_context=ssl.create_default_context(cafile=...)": "use --cafile FILE",
    "use mqtt://, ws:// or secure=False": "use an mqtt:// or ws:// URL",
    " (max_message_size)": "",
}
"""The advice to programs in errors of the library, and what a command offers instead."""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    :param argv: the name of the command and its arguments (default: those of the process)
    :return: the exit code: 0, 1 if the command failed, 130 after Ctrl-C, 143 after SIGTERM, or 141
        if the reader of standard output closed the pipe
    :raises SystemExit: with 2 if the command line is invalid, with 0 after ``--help``
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments = make_parser(argv).parse_args(argv)
    except SystemExit:
        flush()  # the output of --help and --version
        raise
    try:
        if "find_source" in arguments:
            arguments.source = arguments.find_source(arguments)
        received = anyio.run(_run, arguments, backend=arguments.backend)
    except BaseException as raised:
        # A task group wraps the exceptions of its tasks in a group.
        for kind in _HANDLED:
            for exc in _flatten(raised):
                if isinstance(exc, kind):
                    return _exit_code(exc, arguments)
        raise
    return 0 if received is None else _signal_code(received, arguments)


async def _run(arguments: argparse.Namespace) -> signal.Signals | None:
    """
    Run a command, and cancel it on SIGINT or SIGTERM, so that its client disconnects.

    :return: the signal, if one arrived
    """
    if (
        sys.platform == "win32" and arguments.backend == "asyncio"
    ):  # pragma: no cover - asyncio has no signal handlers there
        await arguments.run(arguments)
        return None
    received: signal.Signals | None = None

    async def cancel_on_signal(*, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        # Trio can raise KeyboardInterrupt in any line, also while a cancel scope is being entered
        # or left, which would cause an unrelated error or a hang.
        nonlocal received
        with open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            received = await anext(signals)
        # From here on, a second signal ends the process, even if the broker does not respond.
        tasks.cancel_scope.cancel()

    async with create_task_group() as tasks:
        await tasks.start(cancel_on_signal)
        await arguments.run(arguments)
        tasks.cancel_scope.cancel()
    return received


def _flatten(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for each in exc.exceptions:
            yield from _flatten(each)
    else:
        yield exc


def _exit_code(exc: BaseException, arguments: argparse.Namespace) -> int:
    if isinstance(exc, KeyboardInterrupt):
        return _signal_code(signal.SIGINT, arguments)
    if isinstance(exc, BrokenPipeError):
        return _BROKEN_PIPE
    if isinstance(exc, UsageError):
        arguments.parser.error(str(exc))
    if not isinstance(exc, ReportedError):
        note(_describe(exc, arguments))
    return 1


def _describe(exc: BaseException, arguments: argparse.Namespace) -> str:
    """Return the error's text with the options of commands, and where the refused key is from."""
    text = str(exc)
    for advice, option in _OPTIONS.items():
        text = text.replace(advice, option)
    refused = exc if isinstance(exc, RequestError) else exc.__cause__
    origin = ""
    if isinstance(refused, UnauthorizedError | NotFoundError) and "source" in arguments:
        origin = arguments.source.describe_key(refused)
    return f"{text}; {origin}" if origin else text


def _signal_code(received: signal.Signals, arguments: argparse.Namespace) -> int:
    # A signal is the normal way to end some commands, such as the broker.
    return 0 if "ends_by_signal" in arguments else _SIGNAL_CODE + received
