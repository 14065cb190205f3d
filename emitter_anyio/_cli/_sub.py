"""The command ``sub``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from datetime import UTC, datetime
from itertools import combinations
from typing import Final, TypeAlias

import anyio
from anyio import WouldBlock, create_memory_object_stream, create_task_group
from anyio.abc import ObjectReceiveStream, ObjectSendStream

from emitter_anyio import Emitter, EmitterMessage, EventStream, Gap, UnauthorizedError
from emitter_anyio._values.channels import share
from emitter_anyio._values.router import Matcher, overlap

from . import _arguments as arguments_
from ._arguments import (
    DURATION_HELP,
    TIME_HELP,
    CommandError,
    Parser,
    UsageError,
    add_matcher,
    check_matcher,
)
from ._formats import FORMAT_HELP, Formatter, add_format, to_json
from ._output import Output, counted, hint, note, print_line
from ._source import SECRET_HELP, Source, add_source, stay_connected

_BUFFER_MESSAGES: Final = 4096

_MAX_LINES_PER_WRITE: Final = 256

_EARLIEST: Final = datetime(2018, 1, 2, tzinfo=UTC)
"""A time before that of any stored message."""

Messages: TypeAlias = EventStream[EmitterMessage | Gap]
Batches: TypeAlias = AsyncGenerator[list[EmitterMessage]]


def add_sub(parser: Parser) -> None:
    """Add the arguments of ``sub``."""
    parser.set_command(
        _sub,
        arguments="CHANNEL...",
        description=(
            "Print the messages of channels and of the channels below them, until Ctrl-C.\n\n"
            "A '+' matches any one level of a channel. If the connection is lost, the\n"
            "command reconnects and prints a note to stderr. A key with permission l also\n"
            "replays stored messages (--last, --since, --resume). For --group NAME, the key\n"
            "must be for $share/NAME/CHANNEL. The command fails if --timeout expires before\n"
            "--count is reached.\n\n"
            f"{FORMAT_HELP}\n\n{TIME_HELP}\n{DURATION_HELP}"
        ),
        examples=(
            "  %(prog)s chat/\n"
            "  %(prog)s chat/ --format json | jq .payload\n"
            "  %(prog)s chat/ news/ -v     # two channels\n"
            "  %(prog)s pictures/ --raw -n 1 > picture.png\n"
            "  %(prog)s chat/ --stats      # the rate of messages\n\n"
            "  # only the newest 10, or also those of the last hour\n"
            "  %(prog)s chat/ --last 10 --count 10\n"
            "  %(prog)s chat/ --since 1h --last 1000\n\n"
            "  # a share of the messages\n"
            "  %(prog)s jobs/ --group workers"
        ),
    )
    parser.add_argument(
        "channels",
        nargs="+",
        type=arguments_.pattern,
        metavar="CHANNEL",
        help="channel, such as chat/ or chat/+/news/",
    )
    add_format(parser, "text")
    parser.add_argument(
        "--last",
        type=arguments_.count,
        metavar="N",
        help="replay at most N per channel (default: 1)",
    )
    parser.add_argument(
        "--since",
        type=arguments_.moment,
        metavar="TIME",
        help="replay only messages stored since TIME",
    )
    parser.add_argument(
        "--group",
        type=arguments_.group,
        metavar="NAME",
        help="share the messages with this group",
    )
    parser.add_argument(
        "-n", "--count", type=arguments_.positive, metavar="N", help="exit after N messages"
    )
    parser.add_argument(
        "-t",
        "--timeout",
        type=arguments_.duration,
        metavar="SEC",
        help="exit after this time",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="print messages that were stored while disconnected",
    )
    parser.add_argument(
        "--stats",
        nargs="?",
        const=1.0,
        type=arguments_.period,
        metavar="SEC",
        help="print rates instead, every SEC (default: 1s)",
    )
    add_matcher(parser)
    add_source(parser, key="key with permission r", secret=SECRET_HELP)


async def _sub(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    if arguments.group is not None and (arguments.last or arguments.since or arguments.resume):
        raise UsageError(
            "cannot use --last, --since or --resume with --group: groups receive no stored messages"
        )
    channels: list[str] = arguments.channels
    _check_channels(channels, arguments.matcher)
    async with (
        stay_connected(source, matcher=arguments.matcher) as emitter,
        AsyncExitStack() as stack,
    ):
        streams = [
            await stack.enter_async_context(
                emitter.subscribe(
                    source.key_for(emitter, "rl", share(arguments.group, channel)),
                    channel,
                    arguments.last,
                    since=arguments.since,
                    group=arguments.group,
                    buffer=_BUFFER_MESSAGES,
                    # Wait for a slow reader of the pipe instead of dropping messages.
                    overflow="block",
                    resume=arguments.resume,
                    mark_gaps=True,
                )
            )
            for channel in channels
        ]
        if arguments.last or arguments.since:
            for channel in channels:
                await _check_replay(emitter, source, channel)
        hint(f"subscribed to {', '.join(channels)}; press Ctrl-C to stop")
        async with Output() as output:
            kind = _RatePrinter if arguments.stats else _MessagePrinter
            printer = kind(arguments, output)
            with anyio.move_on_after(arguments.timeout):
                send, receive = create_memory_object_stream[list[EmitterMessage]]()
                with send, receive:
                    async with create_task_group() as tasks:
                        for stream in streams:
                            tasks.start_soon(_forward, stream, send)
                        async with aclosing(_batches(receive, arguments.count)) as batches:
                            await printer.print_all(batches)
                        tasks.cancel_scope.cancel()
    if arguments.count is not None and printer.received < arguments.count:
        raise CommandError(
            f"received {printer.received} of {counted(arguments.count, 'message')} within "
            f"{arguments.timeout:g} s"
        )


async def _check_replay(emitter: Emitter, source: Source, channel: str) -> None:
    """
    Check that the user's key permits reading stored messages.

    The broker accepts a subscription without this permission, and replays nothing.

    :raises CommandError: if it does not
    """
    # Emitter has no stored messages for channels that begin with a wildcard.
    if source.key is None or channel.startswith("+"):
        return
    key = source.key_for(emitter, "l", channel)
    try:
        # No message is this old, so the reply is short.
        await anext(emitter.history(key, channel, 1, until=_EARLIEST), None)
    except UnauthorizedError as exc:
        raise CommandError(
            f"cannot replay the stored messages of {channel!r}: the key lacks permission l; use "
            "one with permissions rl, or omit --last and --since"
        ) from exc


def _check_channels(channels: Sequence[str], matcher: Matcher) -> None:
    """
    Check that messages arrive once.

    :raises UsageError: if two channels can have the same message, or the broker delivers nothing
    """
    for channel in channels:
        check_matcher(channel, matcher)
    for one, other in combinations(channels, 2):
        if overlap(one, other, matcher):
            raise UsageError(
                f"cannot print {one} and {other} together: a message could be in both; use the one "
                "that includes the other, or two commands"
            )


async def _forward(messages: Messages, send: ObjectSendStream[list[EmitterMessage]]) -> None:
    """Send the messages that have arrived, in batches, and print notes about gaps."""
    while True:
        batch: list[EmitterMessage] = []
        try:
            item = await messages.receive()
            while True:
                if isinstance(item, Gap):
                    _note_gap(item)
                else:
                    batch.append(item)
                if len(batch) == _MAX_LINES_PER_WRITE:
                    break
                item = messages.receive_nowait()
        except WouldBlock:
            pass
        if batch:
            await send.send(batch)


async def _batches(
    receive: ObjectReceiveStream[list[EmitterMessage]], limit: int | None
) -> AsyncGenerator[list[EmitterMessage]]:
    """Yield batches until they have as many messages as the limit."""
    left = sys.maxsize if limit is None else limit
    while left:
        batch = (await receive.receive())[:left]
        left -= len(batch)
        yield batch


def _note_gap(gap: Gap) -> None:
    if gap.complete:
        note(f"resumed with {counted(gap.resumed, 'stored message')}")
    else:
        reason = gap.reason or "the connection was lost; use --resume to print stored messages"
        note(f"messages might be missing: {reason}")


class _MessagePrinter:
    """
    Prints messages.

    :ivar received: the number of messages
    """

    def __init__(self, arguments: argparse.Namespace, output: Output) -> None:
        self.received = 0
        self._output = output
        self._formatter = Formatter(arguments, terminal=output.terminal)

    async def print_all(self, batches: Batches) -> None:
        async for batch in batches:
            self.received += len(batch)
            now = datetime.now(UTC)
            lines = (
                self._formatter.line(each, now, **({"replayed": True} if each.replayed else {}))
                for each in batch
            )
            await self._output.write(b"".join(lines))


class _RatePrinter:
    """
    Prints the number, size and rate of messages, in each period and in total.

    :ivar received: the number of messages
    """

    def __init__(self, arguments: argparse.Namespace, output: Output) -> None:
        self.received = 0
        self._bytes = 0
        self._output = output
        self._json = arguments.format == "json"
        self._period: float = arguments.stats

    async def print_all(self, batches: Batches) -> None:
        start = anyio.current_time()
        try:
            async with create_task_group() as tasks:
                tasks.start_soon(self._print_periods, start)
                async for batch in batches:
                    self.received += len(batch)
                    self._bytes += sum(len(message.binary) for message in batch)
                tasks.cancel_scope.cancel()
        finally:
            duration = anyio.current_time() - start
            print_line(self._line("total", self.received, self._bytes, duration))

    async def _print_periods(self, before: float) -> None:
        messages = size = 0
        while True:
            await anyio.sleep_until(before + self._period)
            now = anyio.current_time()
            line = self._line("period", self.received - messages, self._bytes - size, now - before)
            messages, size, before = self.received, self._bytes, now
            await self._output.write(f"{line}\n".encode())

    def _line(self, span: str, messages: int, size: int, seconds: float) -> str:
        rate, byte_rate = messages / max(seconds, 1e-9), size / max(seconds, 1e-9)
        if self._json:
            figures = {"messages": messages, "bytes": size, "seconds": round(seconds, 3)}
            return to_json({"span": span, **figures, "messages_per_second": round(rate, 1)})
        return (
            f"{span:<6}  {counted(messages, 'message')} in {seconds:.1f} s  {rate:,.0f}/s  "
            f"{byte_rate / 1e6:,.2f} MB/s"
        )
