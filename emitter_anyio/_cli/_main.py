"""The command line as a whole: which commands there are, and what a shell is told at the end."""

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

from ._arguments import NAME, CommandError, Parser, UsageError
from ._broker import add_broker, add_license, run_broker
from ._demo import add_demo
from ._doctor import add_doctor
from ._history import add_history
from ._keys import add_ban, add_keygen, add_me
from ._output import flush, note
from ._presence import add_presence
from ._pub import add_link, add_pub
from ._source import find_source
from ._sub import add_sub

_COMMANDS: Final = (
    *(add_demo, add_broker, add_license, add_doctor),
    *(add_pub, add_sub, add_presence, add_history),
    *(add_keygen, add_ban, add_link, add_me),
)

# What a shell reports of a process that such a signal has ended; Windows knows no SIGPIPE.
_INTERRUPTED: Final = 128 + signal.SIGINT
_BROKEN_PIPE: Final = 128 + 13


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    :param argv: its name and arguments; the process's own unless given
    :return: the exit code: 0, 1 if the command failed, or what a shell reports of a process that
        was interrupted, or whose reader has left
    :raises SystemExit: with 2 if the command line is wrong, with 0 behind ``--help``
    """
    try:
        arguments = _make_parser().parse_args(argv)
    except SystemExit:
        flush()  # --help and --version have printed
        raise
    try:
        if "env_file" in arguments:
            arguments.source = find_source(arguments)
        run = _run_on_trio if arguments.backend == "trio" else arguments.run
        anyio.run(run, arguments, backend=arguments.backend)
    except BaseException as raised:
        # Where tasks run side by side, what one of them raises comes in a group.
        for kind in (KeyboardInterrupt, BrokenPipeError, UsageError, CommandError, EmitterError):
            for exc in _leaves(raised):
                if isinstance(exc, kind):
                    return _outcome(exc, arguments)
        raise
    return 0


async def _run_on_trio(arguments: argparse.Namespace) -> None:
    # Trio raises KeyboardInterrupt wherever the program is, also where a cancel scope is half
    # entered or left, which ends in an error of its own or in a hang. asyncio cancels instead.
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


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for each in exc.exceptions:
            yield from _leaves(each)
    else:
        yield exc


def _outcome(exc: BaseException, arguments: argparse.Namespace) -> int:
    if isinstance(exc, KeyboardInterrupt):
        # That is how the broker is told to end, where or while nothing waits for the signal.
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
        description=(
            "A client of Emitter (https://emitter.io), and a broker to develop against.\n\n"
            "The broker is at mqtt://127.0.0.1:8080 unless --url or EMITTER_URL says something "
            "else; channels are\nopened by --key or EMITTER_KEY, or by a key made with --secret or "
            "EMITTER_SECRET."
        ),
        epilog=(
            "start with:\n"
            "  %(prog)s demo\n"
            "or with a broker of your own, and in another terminal its URL and secret key:\n"
            "  %(prog)s broker\n"
            "  export EMITTER_URL=mqtt://127.0.0.1:8080 EMITTER_SECRET=...\n"
            "  %(prog)s sub chat/ &\n"
            "  %(prog)s pub chat/ hello\n\n"
            "exit codes: 0 all is well, 1 it failed, 2 a wrong command line, 130 Ctrl-C, 141 a "
            "closed pipe"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    return parser
