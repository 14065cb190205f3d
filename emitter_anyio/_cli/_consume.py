"""The command ``consume``."""

from __future__ import annotations

import argparse
import base64
from typing import Final

import anyio
from anyio import create_task_group, to_thread

from emitter_anyio import Consumer, StoredMessage

from . import _arguments as arguments_
from ._arguments import DURATION_HELP, CommandError, Parser, UsageError, add_matcher, check_matcher
from ._cursor_file import CursorFile
from ._formats import FORMAT_HELP, Formatter, add_format
from ._output import Output, counted, hint
from ._source import SECRET_HELP, Source, add_source, stay_connected

_MAX_UNSAVED_MESSAGES: Final = 256
"""The maximum number of messages that are printed again after a crash."""


def add_consume(parser: Parser) -> None:
    """Add the arguments of ``consume``."""
    parser.set_command(
        _consume,
        arguments="CHANNEL --cursor FILE",
        description=(
            "Print the stored messages of a channel and of the channels below it, oldest\n"
            "first, and then wait for new ones, until Ctrl-C.\n\n"
            "FILE contains the position. It is replaced after messages have been written to\n"
            "stdout, and flushed to the disk if stdout is a file. After a restart, the\n"
            "command continues at this position, so it skips no stored message. After a crash\n"
            "or Ctrl-C, it might print up to 256 messages again.\n\n"
            f"{FORMAT_HELP}\n\n{DURATION_HELP}"
        ),
        examples=(
            "  %(prog)s orders/ -c orders.cursor >> orders.jsonl\n"
            "  %(prog)s orders/ -c new.cursor --new --format text\n"
            "  %(prog)s orders/ -c orders.cursor -n 100 --timeout 1m"
        ),
    )
    parser.add_argument(
        "channel",
        type=arguments_.pattern,
        metavar="CHANNEL",
        help="channel, such as orders/ or orders/+/paid/",
    )
    parser.add_argument(
        "-c",
        "--cursor",
        required=True,
        metavar="FILE",
        help="file with the position; created if missing",
    )
    parser.add_argument(
        "--new",
        action="store_true",
        help="without FILE, begin with the next message",
    )
    add_format(parser, "json")
    parser.add_argument(
        "-n", "--count", type=arguments_.positive, metavar="N", help="exit after N messages"
    )
    parser.add_argument(
        "-t", "--timeout", type=arguments_.duration, metavar="SEC", help="exit after this time"
    )
    add_matcher(parser)
    add_source(parser, key="key with permissions rl", secret=SECRET_HELP)


async def _consume(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    channel: str = arguments.channel
    check_matcher(channel, arguments.matcher)
    file = CursorFile(arguments.cursor, channel)
    cursor = await to_thread.run_sync(file.load)
    limit: int | None = arguments.count
    async with (
        Output() as output,
        stay_connected(source, matcher=arguments.matcher) as emitter,
    ):
        key = source.key_for(emitter, "rl", channel)
        after = cursor or ("now" if arguments.new else None)
        try:
            entering = emitter.consume(key, channel, after=after)
        except ValueError as exc:
            if cursor is not None:
                raise CommandError(f"cannot use {arguments.cursor}: {exc}") from exc
            raise UsageError(str(exc)) from None
        async with entering as log:
            # Fail early if the file cannot be written, and keep where --new began.
            await to_thread.run_sync(file.save, log.cursor)
            if arguments.format != "raw":
                await output.end_line()
            hint(f"consuming {channel}; press Ctrl-C to stop")
            printer = _Printer(log, output, file, Formatter(arguments, terminal=output.terminal))
            async with create_task_group() as tasks:
                tasks.start_soon(printer.print_all)
                received = 0
                with anyio.move_on_after(arguments.timeout):
                    async for message in log:
                        printer.add(message)
                        received += 1
                        if received == limit:
                            break
                        await printer.wait_below(_MAX_UNSAVED_MESSAGES)
                await printer.wait_below(1)
                tasks.cancel_scope.cancel()
    if limit is not None and received < limit:
        raise CommandError(
            f"received {received} of {counted(limit, 'message')} within {arguments.timeout:g} s"
        )


class _Printer:
    """
    Prints messages, and then saves the cursor.

    Messages that are added while others are being printed or saved are handled together.

    :param log: its cursor is the position after the message that was added last
    """

    def __init__(
        self, log: Consumer, output: Output, file: CursorFile, formatter: Formatter
    ) -> None:
        self._log = log
        self._output = output
        self._file = file
        self._formatter = formatter
        self._waiting: list[StoredMessage] = []
        self._printing = 0
        self._added = anyio.Event()
        self._saved = anyio.Event()

    def add(self, message: StoredMessage) -> None:
        """Add a message, immediately after the consumer has returned it."""
        self._waiting.append(message)
        self._added.set()

    async def wait_below(self, limit: int) -> None:
        """Wait until fewer messages than this have been added but not saved."""
        while len(self._waiting) + self._printing >= limit:
            await self._saved.wait()

    async def print_all(self) -> None:
        """Print and save until cancelled."""
        while True:
            await self._added.wait()
            # No await between these lines: the cursor covers exactly the messages in the batch.
            batch, self._waiting = self._waiting, []
            cursor = self._log.cursor
            self._added = anyio.Event()
            self._printing = len(batch)
            lines = (
                self._formatter.line(each, each.time, id=base64.b64encode(each.id).decode())
                for each in batch
            )
            await self._output.write(b"".join(lines))
            with anyio.CancelScope(shield=True):
                await self._output.sync()
                await to_thread.run_sync(self._file.save, cursor)
            self._printing = 0
            self._saved.set()
            self._saved = anyio.Event()
