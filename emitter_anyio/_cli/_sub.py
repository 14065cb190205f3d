"""``sub``: print what comes, or how much."""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Final, TypeAlias, get_args

import anyio
from anyio import WouldBlock

from emitter_anyio import EmitterMessage, EventStream, Gap
from emitter_anyio._values.channels import share
from emitter_anyio._values.router import Matcher

from . import _arguments as arguments_
from ._arguments import CommandError, Commands, UsageError, add_command
from ._formats import Formatter, add_format, to_json
from ._output import Output, hint, note, say
from ._source import TO_MAKE_A_KEY, Source, add_source, lasting

_BUFFER: Final = 4096

_TOGETHER: Final = 256
"""So many lines at most are written at once, where they have come at once."""

Messages: TypeAlias = EventStream[EmitterMessage | Gap]
Batches: TypeAlias = AsyncGenerator[list[EmitterMessage]]


def add_sub(commands: Commands) -> None:
    """Add ``sub``."""
    parser = add_command(
        commands,
        "sub",
        _sub,
        help="print the messages of a channel",
        description=(
            "Print the messages of a channel and of all below it, each at once, until Ctrl-C. A "
            "level of the\nchannel may be '+', which stands for any one. When the link is lost, "
            "stderr tells, and it comes back."
        ),
        examples=(
            "  %(prog)s chat/\n"
            "  %(prog)s chat/ --last 10 --count 10             # the newest 10, and no more\n"
            "  %(prog)s chat/ --since 1h --last 1000           # of the last hour, then live ones\n"
            "  %(prog)s chat/ --format json | jq .payload\n"
            "  %(prog)s jobs/ --group workers                  # shared with others of the group\n"
            "  %(prog)s chat/ --stats                          # how many, how much, how fast"
        ),
    )
    parser.add_argument("channel", type=arguments_.pattern, help="such as chat/ or chat/+/news/")
    add_format(parser, "text")
    parser.add_argument(
        "--last",
        type=arguments_.count,
        metavar="N",
        help="first print so many stored messages, if the key may load (l); 0 for none (default: "
        "the newest one, as Emitter does)",
    )
    parser.add_argument(
        "--since",
        type=arguments_.moment,
        metavar="TIME",
        help="of the stored ones only those since then: 10m, 2h or 1d ago, "
        "2030-01-31T12:00 here, or unix seconds",
    )
    parser.add_argument(
        "--group",
        type=arguments_.group,
        metavar="NAME",
        help="share the messages with all others of this group: each goes to one of them; the key "
        "must be for $share/NAME/CHANNEL",
    )
    parser.add_argument(
        "-n", "--count", type=arguments_.positive, metavar="N", help="end after so many messages"
    )
    parser.add_argument(
        "-t",
        "--timeout",
        type=arguments_.seconds,
        metavar="SECONDS",
        help="end after that; it is a failure if --count has not been reached",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="after a lost link, also print what was stored meanwhile (the key needs l)",
    )
    parser.add_argument(
        "--stats",
        nargs="?",
        const=1.0,
        type=arguments_.period,
        metavar="SECONDS",
        help="instead of the messages print how many came, every so many seconds (default: 1)",
    )
    parser.add_argument(
        "--matcher",
        choices=get_args(Matcher),
        default="emitter",
        help="as the broker is configured (default: %(default)s)",
    )
    add_source(
        parser,
        key="a key that permits to read (r)",
        secret=TO_MAKE_A_KEY,
    )


async def _sub(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    if arguments.group is not None and (arguments.last or arguments.since or arguments.resume):
        raise UsageError("nothing is replayed to a group: leave out --last, --since and --resume")
    filter = share(arguments.group, arguments.channel)
    async with lasting(source, matcher=arguments.matcher) as emitter:
        async with emitter.subscribe(
            source.key_for(emitter, "rl", filter),
            arguments.channel,
            arguments.last,
            since=arguments.since,
            group=arguments.group,
            buffer=_BUFFER,
            # A pipe that is slow for a while is no reason to lose anything.
            overflow="block",
            resume=arguments.resume,
            mark_gaps=True,
        ) as messages:
            hint(f"listening to {arguments.channel}; Ctrl-C ends")
            async with Output() as output:
                kind = _Rates if arguments.stats else _Lines
                printer = kind(arguments, output)
                with anyio.move_on_after(arguments.timeout):
                    async with aclosing(_batches(messages, arguments.count)) as batches:
                        await printer.follow(batches)
    if arguments.count is not None and printer.taken < arguments.count:
        raise CommandError(
            f"{printer.taken} of {arguments.count} messages came within {arguments.timeout:g} s"
        )


async def _batches(messages: Messages, most: int | None) -> AsyncGenerator[list[EmitterMessage]]:
    """Give what has come, as soon as something has; notes tell of gaps."""
    left = sys.maxsize if most is None else most
    while left:
        batch: list[EmitterMessage] = []
        try:
            item = await messages.receive()
            while True:
                if isinstance(item, Gap):
                    _tell(item)
                else:
                    batch.append(item)
                if len(batch) == min(left, _TOGETHER):
                    break
                item = messages.receive_nowait()
        except WouldBlock:
            pass
        left -= len(batch)
        if batch:
            yield batch


def _tell(gap: Gap) -> None:
    if gap.complete:
        note(f"{gap.resumed} messages that were stored meanwhile follow")
    else:
        note(f"messages may be missing here: {gap.reason or 'the link was away (see --resume)'}")


class _Lines:
    """
    Prints the messages.

    :ivar taken: how many there were
    """

    def __init__(self, arguments: argparse.Namespace, output: Output) -> None:
        self.taken = 0
        self._output = output
        self._formatter = Formatter(arguments, terminal=output.terminal)

    async def follow(self, batches: Batches) -> None:
        async for batch in batches:
            self.taken += len(batch)
            now = datetime.now(UTC)
            lines = (
                self._formatter.line(each, now, **({"replayed": True} if each.replayed else {}))
                for each in batch
            )
            await self._output.write(b"".join(lines))


class _Rates:
    """
    Prints how many messages come, how much they are, and how fast: now and then, and at the end.

    :ivar taken: how many there were
    """

    def __init__(self, arguments: argparse.Namespace, output: Output) -> None:
        self.taken = 0
        self._bytes = 0
        self._output = output
        self._json = arguments.format == "json"
        self._period: float = arguments.stats

    async def follow(self, batches: Batches) -> None:
        start = anyio.current_time()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._tell_now_and_then, start)
                async for batch in batches:
                    self.taken += len(batch)
                    self._bytes += sum(len(message.binary) for message in batch)
                tasks.cancel_scope.cancel()
        finally:
            say(self._line("all", self.taken, self._bytes, anyio.current_time() - start))

    async def _tell_now_and_then(self, before: float) -> None:
        messages = size = 0
        while True:
            await anyio.sleep_until(before + self._period)
            now = anyio.current_time()
            line = self._line("now", self.taken - messages, self._bytes - size, now - before)
            messages, size, before = self.taken, self._bytes, now
            await self._output.write(f"{line}\n".encode())

    def _line(self, which: str, messages: int, size: int, seconds: float) -> str:
        rate, flow = messages / max(seconds, 1e-9), size / max(seconds, 1e-9)
        if self._json:
            figures = {"messages": messages, "bytes": size, "seconds": round(seconds, 3)}
            return to_json({"span": which, **figures, "messages_per_second": round(rate, 1)})
        return (
            f"{which}  {messages:,} messages in {seconds:.1f} s  {rate:,.0f}/s  "
            f"{flow / 1e6:,.2f} MB/s"
        )
