"""The command ``history``."""

from __future__ import annotations

import argparse
import base64
from typing import Final

from emitter_anyio import HistoryIncompleteError, StoredMessage

from . import _arguments as arguments_
from ._arguments import TIME_HELP, Parser, UsageError
from ._formats import FORMAT_HELP, Formatter, add_format
from ._output import Output
from ._source import SECRET_HELP, Source, add_source, connect_once
from ._terminal import progress

_MAX_LINES_PER_WRITE: Final = 256


def add_history(parser: Parser) -> None:
    """Add the arguments of ``history``."""
    parser.set_command(
        _history,
        arguments="CHANNEL",
        description=(
            "Print the stored messages of a channel and of channels below it, oldest first.\n\n"
            "A '+' matches any one level of the channel, except the first.\n\n"
            f"{FORMAT_HELP}\n\n{TIME_HELP}"
        ),
        examples=(
            "  %(prog)s chat/    # the newest 100\n"
            "  %(prog)s chat/ --last 100000 > chat.jsonl\n"
            "  %(prog)s chat/ --since 2030-01-31 --until 2030-02-01"
        ),
    )
    parser.add_argument(
        "channel",
        type=arguments_.pattern,
        metavar="CHANNEL",
        help="channel, such as chat/ or chat/+/news/",
    )
    add_format(parser, "json")
    parser.add_argument(
        "--last",
        type=arguments_.count,
        default=100,
        metavar="N",
        help="at most the newest N messages (default: %(default)s)",
    )
    for option in ("since", "until"):
        parser.add_argument(
            f"--{option}",
            type=arguments_.moment,
            metavar="TIME",
            help=f"only messages stored {option} TIME",
        )
    parser.add_argument(
        "--newest-first",
        action="store_true",
        help="print the newest first, without gathering all",
    )
    add_source(parser, key="key with permission l", secret=SECRET_HELP)


async def _history(arguments: argparse.Namespace) -> None:
    async with Output() as output:
        await _print(arguments, output)


async def _print(arguments: argparse.Namespace, output: Output) -> None:
    source: Source = arguments.source
    formatter = Formatter(arguments, terminal=output.terminal)

    async def write(messages: list[StoredMessage]) -> None:
        lines = (
            formatter.line(each, each.time, id=base64.b64encode(each.id).decode())
            for each in messages
        )
        await output.write(b"".join(lines))

    missing: HistoryIncompleteError | None = None
    async with connect_once(source) as emitter:
        key = source.key_for(emitter, "l", arguments.channel)
        try:
            # The broker pages backwards from the newest message. Gathering them here, instead of
            # asking for the oldest first, lets the progress bar advance.
            found = emitter.history(
                key,
                arguments.channel,
                arguments.last,
                since=arguments.since,
                until=arguments.until,
                order="newest",
            )
        except ValueError as exc:
            raise UsageError(str(exc)) from None
        gathered: list[StoredMessage] = []
        # Lines printed on a terminal would break the progress bar.
        hidden = output.terminal and arguments.newest_first
        with progress(f"reading {arguments.channel}", 0 if hidden else arguments.last) as add:
            while True:
                try:
                    message = await anext(found, None)
                except HistoryIncompleteError as exc:
                    missing = missing or exc
                    continue
                if message is None:
                    break
                gathered.append(message)
                add(1)
                if arguments.newest_first and len(gathered) == _MAX_LINES_PER_WRITE:
                    await write(gathered)
                    gathered.clear()
        if not arguments.newest_first:
            gathered.reverse()
        for begin in range(0, len(gathered), _MAX_LINES_PER_WRITE):
            await write(gathered[begin : begin + _MAX_LINES_PER_WRITE])
    if missing is not None:
        # Raised last, so that all readable messages are printed first.
        raise missing
