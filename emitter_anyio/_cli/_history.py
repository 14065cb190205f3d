"""``history``: print what the broker has stored."""

from __future__ import annotations

import argparse
import base64
from typing import Final

from emitter_anyio import HistoryIncompleteError, StoredMessage

from . import _arguments as arguments_
from ._arguments import Commands, UsageError, add_command
from ._formats import Formatter, add_format
from ._output import Output
from ._painting import progress
from ._source import TO_MAKE_A_KEY, Source, add_source, asking

_TOGETHER: Final = 256
"""So many lines at most are written at once."""


def add_history(commands: Commands) -> None:
    """Add ``history``."""
    parser = add_command(
        commands,
        "history",
        _history,
        help="print what the broker has stored",
        description=(
            "Print the stored messages of a channel and of all below it, the oldest of them first, "
            "and end. A\nlevel of the channel but the first may be '+'."
        ),
        examples=(
            "  %(prog)s chat/                           # the newest 100\n"
            "  %(prog)s chat/ --last 100000 > chat.jsonl\n"
            "  %(prog)s chat/ --since 2030-01-31 --until 2030-02-01 --format text -v"
        ),
    )
    parser.add_argument("channel", type=arguments_.pattern, help="such as chat/ or chat/+/news/")
    add_format(parser, "json")
    parser.add_argument(
        "--last",
        type=arguments_.count,
        default=100,
        metavar="N",
        help="the newest so many at most (default: %(default)s)",
    )
    for option, which in (("--since", "after"), ("--until", "before")):
        parser.add_argument(
            option,
            type=arguments_.moment,
            metavar="TIME",
            help=f"only those {which} that: 10m, 2h or 1d ago, 2030-01-31T12:00 here, or unix "
            "seconds",
        )
    parser.add_argument(
        "--newest-first",
        action="store_true",
        help="the newest first, which begins at once however many there are",
    )
    add_source(
        parser,
        key="a key that permits to load (l)",
        secret=TO_MAKE_A_KEY,
    )


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
    async with asking(source) as emitter:
        key = source.key_for(emitter, "l", arguments.channel)
        try:
            # The oldest come last: while they are gathered, somebody may want to see how far it is.
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
        # Lines and a bar do not go together on a terminal.
        alone = output.terminal and arguments.newest_first
        with progress(f"reading {arguments.channel}", 0 if alone else arguments.last) as add:
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
                if arguments.newest_first and len(gathered) == _TOGETHER:
                    await write(gathered)
                    gathered.clear()
        if not arguments.newest_first:
            gathered.reverse()
        for begin in range(0, len(gathered), _TOGETHER):
            await write(gathered[begin : begin + _TOGETHER])
    if missing is not None:
        # What can be read has been printed.
        raise missing
