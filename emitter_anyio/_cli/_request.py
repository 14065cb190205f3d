"""The command ``request``."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from typing import Final

from anyio import EndOfStream

from emitter_anyio import Emitter, EmitterMessage, ReplyError

from . import _arguments as arguments_
from ._arguments import DURATION_HELP, CommandError, Parser, UsageError, add_matcher
from ._formats import REPLY_FORMAT_HELP, Formatter, add_format
from ._input import STDIN, read_all
from ._output import Output, counted, hint, is_terminal, note
from ._source import SECRET_HELP, Source, add_source, connect_once

_DEFAULT_TIMEOUT_SECONDS: Final = 10.0


def add_request(parser: Parser) -> None:
    """Add the arguments of ``request``."""
    parser.set_command(
        _request,
        arguments="CHANNEL [MESSAGE]",
        description=(
            "Send a request to the clients that serve a channel, and print the reply.\n\n"
            "By default, the command prints the first reply. With --replies N, it prints N\n"
            "replies, and with --replies 0 all replies that arrive before --timeout. It fails\n"
            "if replies are missing, or if the serving client reports an error.\n\n"
            f"{REPLY_FORMAT_HELP}\n\n{DURATION_HELP}"
        ),
        examples=(
            "  %(prog)s upper/ hello\n"
            "  %(prog)s small/ --file photo.jpg --raw > small.jpg\n\n"
            "  # the replies of all servers\n"
            "  %(prog)s status/ '' --replies 0 --timeout 2s"
        ),
    )
    parser.add_argument(
        "channel",
        type=arguments_.channel,
        metavar="CHANNEL",
        help="channel that is served, such as upper/",
    )
    parser.add_argument(
        "message",
        nargs="?",
        metavar="MESSAGE",
        help="text to send (default: all of stdin)",
    )
    parser.add_argument(
        "-f", "--file", metavar="FILE", help="send a file, or all of stdin with '-'"
    )
    add_format(parser, "text")
    parser.add_argument(
        "-t",
        "--timeout",
        type=arguments_.period,
        default=_DEFAULT_TIMEOUT_SECONDS,
        metavar="SEC",
        help=f"wait at most this time (default: {_DEFAULT_TIMEOUT_SECONDS:g}s)",
    )
    parser.add_argument(
        "-n",
        "--replies",
        type=arguments_.count,
        default=1,
        metavar="N",
        help="print N replies; 0 for all (default: 1)",
    )
    add_matcher(parser)
    add_source(parser, key="key with rw for CHANNEL/#/", secret=SECRET_HELP)


async def _request(arguments: argparse.Namespace) -> None:
    if arguments.file is not None and arguments.message is not None:
        raise UsageError("give a message or --file, not both")
    source: Source = arguments.source
    payload = await _payload(arguments)
    async with Output() as output, connect_once(source, matcher=arguments.matcher) as emitter:
        printer = _Printer(arguments, output)
        if arguments.replies == 1:
            key = source.key_for(emitter, "rw", f"{arguments.channel}#/")
            reply = await emitter.request(
                key, arguments.channel, payload, timeout=arguments.timeout
            )
            await printer.print(reply)
        else:
            await _request_many(arguments, emitter, payload, printer)


async def _payload(arguments: argparse.Namespace) -> bytes:
    if arguments.message is not None and arguments.message != STDIN:
        message: str = arguments.message
        return message.encode(errors="surrogateescape")
    name: str = STDIN if arguments.file is None else arguments.file
    if name == STDIN and is_terminal(sys.stdin):
        hint("sending all lines as one request; press Ctrl-D to finish")
    return await read_all(name)


async def _request_many(
    arguments: argparse.Namespace, emitter: Emitter, payload: bytes, printer: _Printer
) -> None:
    source: Source = arguments.source
    key = source.key_for(emitter, "rw", f"{arguments.channel}#/")
    expected: int = arguments.replies
    count, errors = 0, 0
    async with emitter.request_many(
        key, arguments.channel, payload, count=expected or None, timeout=arguments.timeout
    ) as replies:
        while True:
            try:
                await printer.print(await replies.receive())
            except ReplyError as exc:
                note(str(exc))
                errors += 1
            except EndOfStream:
                break
            count += 1
    if count < (expected or 1):
        received = f"{count} of {expected} replies" if expected else "no reply"
        raise CommandError(f"received {received} within {arguments.timeout:g} s")
    if errors:
        raise CommandError(f"the serving clients reported {counted(errors, 'error')}")


class _Printer:
    """Prints replies."""

    def __init__(self, arguments: argparse.Namespace, output: Output) -> None:
        self._output = output
        self._formatter = Formatter(arguments, terminal=output.terminal, reply=True)

    async def print(self, reply: EmitterMessage) -> None:
        """Print a reply."""
        await self._output.write(self._formatter.line(reply, datetime.now(UTC)))
