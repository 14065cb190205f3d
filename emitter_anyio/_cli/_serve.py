"""The command ``serve``."""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Sequence
from functools import partial
from typing import Final
from urllib.parse import unquote, urlsplit

from anyio import create_task_group, to_thread

from emitter_anyio import EmitterMessage
from emitter_anyio._values.channels import share

from . import _arguments as arguments_
from ._arguments import DURATION_HELP, CommandError, Parser, UsageError, add_matcher
from ._output import hint, print_line
from ._process import Program
from ._source import SECRET_HELP, Source, add_source, stay_connected

_DEFAULT_TIMEOUT_SECONDS: Final = 60.0
_DEFAULT_PROCESSES: Final = 8


def add_serve(parser: Parser) -> None:
    """Add the arguments of ``serve``."""
    parser.set_command(
        _serve,
        arguments="CHANNEL --exec CMD",
        description=(
            "Serve the requests on a channel with a program, until Ctrl-C.\n\n"
            "The program runs once for each request. It reads the payload from stdin, and\n"
            "what it writes to stdout is the reply. If its exit status is not 0, the\n"
            "requester gets an error with the status and the last line of its stderr.\n\n"
            "CMD is split into words like a shell command, but no shell runs it, except\n"
            "with --shell. The program does not inherit the EMITTER_ variables. It is killed\n"
            "with its child processes when --timeout expires, and when the request or this\n"
            "command is cancelled; child processes that it leaves behind are killed too.\n\n"
            "When the channel is served, the command prints a line. With --group, use\n"
            "--secret or a key for #/, because the group needs a second key.\n\n"
            f"{DURATION_HELP}"
        ),
        examples=(
            "  %(prog)s upper/ --exec 'tr a-z A-Z'\n"
            "  %(prog)s small/ --exec 'convert - -resize 200 -' -p 2\n"
            "  %(prog)s count/ --shell --exec 'sort | uniq -c'\n"
            "  %(prog)s jobs/ --exec ./work.py --group workers -t 5m"
        ),
    )
    parser.add_argument(
        "channel",
        type=arguments_.channel,
        metavar="CHANNEL",
        help="channel to serve, such as upper/",
    )
    parser.add_argument(
        "-e",
        "--exec",
        required=True,
        metavar="CMD",
        help="program to run, with its arguments",
    )
    parser.add_argument("--shell", action="store_true", help="run CMD with a shell (/bin/sh)")
    parser.add_argument(
        "-t",
        "--timeout",
        type=arguments_.period,
        default=_DEFAULT_TIMEOUT_SECONDS,
        metavar="SEC",
        help=f"kill a process after this time (default: {_DEFAULT_TIMEOUT_SECONDS:g}s)",
    )
    parser.add_argument(
        "-p",
        "--processes",
        type=arguments_.positive,
        default=_DEFAULT_PROCESSES,
        metavar="N",
        help="run at most N processes (default: %(default)s)",
    )
    parser.add_argument(
        "--group",
        type=arguments_.group,
        metavar="NAME",
        help="share the requests with this group",
    )
    add_matcher(parser)
    add_source(parser, key="key with rw for CHANNEL/#/", secret=SECRET_HELP)


async def _serve(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    channel: str = arguments.channel
    program = Program(await _command(arguments), arguments.timeout, _secrets(source))

    async def reply(request: EmitterMessage) -> bytes:
        return await program.run(request.binary)

    async with stay_connected(source, matcher=arguments.matcher) as emitter:
        key = source.key_for(emitter, "rw", f"{channel}#/")
        group: str | None = arguments.group
        group_key = None
        if group is not None:
            filter = f"{channel}#/" if arguments.matcher == "mqtt" else channel
            group_key = source.key_for(emitter, "r", share(group, filter))
        serve = partial(
            emitter.serve,
            group=group,
            group_key=group_key,
            concurrency=arguments.processes,
        )
        async with create_task_group() as tasks:
            await tasks.start(serve, key, channel, reply)
            print_line(f"serving {channel}")
            hint("press Ctrl-C to stop")


async def _command(arguments: argparse.Namespace) -> str | Sequence[str]:
    line: str = arguments.exec
    if arguments.shell:
        return line
    try:
        words = shlex.split(line)
    except ValueError as exc:
        raise UsageError(f"--exec: {str(exc).lower()}") from None
    if not words:
        raise UsageError("--exec: expected the name of a program")
    if await to_thread.run_sync(shutil.which, words[0]) is None:
        raise CommandError(f"cannot run {words[0]}: there is no such program")
    return words


def _secrets(source: Source) -> list[str]:
    password = urlsplit(source.url).password or ""
    found = (source.key, source.secret, password, unquote(password))
    return [secret for secret in found if secret]
