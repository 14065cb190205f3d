"""The list of commands, and the exit code."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import anyio
from anyio import create_task_group, open_signal_receiver

from emitter_anyio import EmitterError, __version__

from ._arguments import NAME, CommandError, HelpFormatter, Parser, UsageError
from ._broker import add_broker, add_license, run_broker
from ._consume import add_consume
from ._demo import add_demo
from ._doctor import add_doctor
from ._history import add_history
from ._keys import add_ban, add_keygen, add_me
from ._output import flush, note
from ._presence import add_presence
from ._pub import add_link, add_pub
from ._request import add_request
from ._serve import add_serve
from ._source import DEFAULT_URL, find_source
from ._sub import add_sub

_COMMANDS: Final = (
    *(add_demo, add_broker, add_license, add_doctor),
    *(add_pub, add_sub, add_presence, add_history, add_consume),
    *(add_request, add_serve),
    *(add_keygen, add_ban, add_link, add_me),
)

# The exit codes that a shell reports for a process ended by these signals. Windows has no SIGPIPE.
_INTERRUPTED: Final = 128 + signal.SIGINT
_BROKEN_PIPE: Final = 128 + 13


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    :param argv: the name of the command and its arguments (default: those of the process)
    :return: the exit code: 0, 1 if the command failed, 130 after Ctrl-C, or 141 if the reader of
        standard output closed the pipe
    :raises SystemExit: with 2 if the command line is invalid, with 0 after ``--help``
    """
    try:
        arguments = _make_parser().parse_args(argv)
    except SystemExit:
        flush()  # the output of --help and --version
        raise
    try:
        if "env_file" in arguments:
            arguments.source = find_source(arguments)
        run = _run_on_trio if arguments.backend == "trio" else arguments.run
        anyio.run(run, arguments, backend=arguments.backend)
    except BaseException as raised:
        # A task group wraps the exceptions of its tasks in a group.
        for kind in (KeyboardInterrupt, BrokenPipeError, UsageError, CommandError, EmitterError):
            for exc in _flatten(raised):
                if isinstance(exc, kind):
                    return _exit_code(exc, arguments)
        raise
    return 0


async def _run_on_trio(arguments: argparse.Namespace) -> None:
    # Trio can raise KeyboardInterrupt in any line, also while a cancel scope is being entered or
    # left, which would cause an unrelated error or a hang. asyncio cancels the main task instead.
    interrupted = False

    async def cancel_if_interrupted() -> None:
        nonlocal interrupted
        with open_signal_receiver(signal.SIGINT) as signals:
            async for _ in signals:
                break
        interrupted = True
        tasks.cancel_scope.cancel()

    async with create_task_group() as tasks:
        tasks.start_soon(cancel_if_interrupted)
        await arguments.run(arguments)
        tasks.cancel_scope.cancel()
    if interrupted:
        raise KeyboardInterrupt


def _flatten(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for each in exc.exceptions:
            yield from _flatten(each)
    else:
        yield exc


def _exit_code(exc: BaseException, arguments: argparse.Namespace) -> int:
    if isinstance(exc, KeyboardInterrupt):
        # Ctrl-C is the normal way to stop the broker, also before it waits for the signal.
        return 0 if arguments.run is run_broker else _INTERRUPTED
    if isinstance(exc, BrokenPipeError):
        return _BROKEN_PIPE
    if isinstance(exc, UsageError):
        arguments.parser.error(str(exc))
    note(str(exc))
    return 1


def _make_parser() -> Parser:
    as_module = Path(sys.argv[0]).name == "__main__.py"
    parser = Parser(
        prog="python -m emitter_anyio" if as_module else NAME,
        description="A client for Emitter (https://emitter.io), and a development broker.",
        epilog=(
            "environment:\n"
            f"  EMITTER_URL     URL of the broker (default: {DEFAULT_URL})\n"
            "  EMITTER_KEY     channel key\n"
            "  EMITTER_SECRET  secret key; without a channel key, commands generate one\n\n"
            "examples:\n"
            "  %(prog)s demo\n\n"
            "  # a development broker, and in a second terminal two clients of it\n"
            "  %(prog)s broker\n"
            f"  export EMITTER_URL={DEFAULT_URL} EMITTER_SECRET=...\n"
            "  %(prog)s sub chat/ &\n"
            "  %(prog)s pub chat/ hello\n\n"
            "exit codes:\n"
            "  0 success, 1 failure, 2 invalid command line, 130 Ctrl-C, 141 closed pipe"
        ),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    return parser
