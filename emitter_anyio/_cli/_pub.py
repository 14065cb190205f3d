"""The commands ``pub`` and ``link``, which publish messages."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Literal

import anyio
from anyio.lowlevel import checkpoint

from emitter_anyio import ConnectionLostError, Emitter, MessageTooLargeError, RequestError

from . import _arguments as arguments_
from ._arguments import DURATION_HELP, CommandError, Parser, UsageError
from ._formats import to_json
from ._input import STDIN, read_all, remaining_bytes
from ._outgoing import Outgoing, each_line, recorded, repeated, spaced
from ._output import counted, hint, print_line
from ._source import SECRET_HELP, Source, add_source, connect_once, stay_connected
from ._terminal import progress


def add_pub(parser: Parser) -> None:
    """Add the arguments of ``pub``."""
    parser.set_command(
        _pub,
        arguments="CHANNEL [MESSAGE]",
        description=(
            "Publish a message, each line of standard input, a file, or recorded messages.\n\n"
            "The command ends when the broker has read every message. It fails if the broker\n"
            "refused one. With --qos 1, each message waits until the broker has accepted the\n"
            "one before; this is the default for a single message.\n\n"
            "--replay reads the lines that 'sub --format json' and 'history' print. It\n"
            "publishes the messages of CHANNEL, and of the channels below it, to the channels\n"
            "where they were recorded. It keeps the times between them: --speed 2 halves\n"
            "these times, and --speed 0 does not wait.\n\n"
            "On a terminal, long input shows a progress bar.\n\n"
            f"{DURATION_HELP}"
        ),
        examples=(
            "  %(prog)s chat/ hello\n"
            "  %(prog)s chat/ hello --ttl 1h       # store the message\n"
            "  %(prog)s chat/ hello --count 1000\n"
            "  %(prog)s chat/ hello --interval 5   # until Ctrl-C\n"
            "  %(prog)s chat/ --file picture.png\n"
            "  %(prog)s chat/ --replay chat.jsonl --speed 10\n\n"
            "  # each line is a message\n"
            "  tail -f log | %(prog)s chat/"
        ),
    )
    _add_channel(parser)
    _add_message(parser)
    parser.add_argument(
        "-f", "--file", metavar="FILE", help="publish a file, or all of stdin with '-'"
    )
    parser.add_argument(
        "-n",
        "--count",
        type=arguments_.positive,
        metavar="N",
        help="publish the message N times",
    )
    parser.add_argument(
        "-i",
        "--interval",
        type=arguments_.period,
        metavar="SEC",
        help="publish a message every SEC seconds",
    )
    parser.add_argument(
        "--replay", metavar="FILE", help="publish recorded messages ('-': of stdin)"
    )
    parser.add_argument(
        "--speed",
        type=_speed,
        metavar="FACTOR",
        help="speed of --replay; 0 does not wait (default: 1)",
    )
    _add_options(parser)
    parser.add_argument(
        "-q",
        "--qos",
        type=int,
        choices=(0, 1),
        metavar="QOS",
        help="0, or 1 to wait until the broker has accepted",
    )
    parser.add_argument(
        "-r",
        "--retain",
        action="store_true",
        help="store for 30 days (needs permission s)",
    )
    add_source(parser, key="key with permission w", secret=SECRET_HELP)


def add_link(parser: Parser) -> None:
    """Add the arguments of ``link``."""
    parser.set_command(
        _link,
        arguments="NAME CHANNEL [MESSAGE]",
        description=(
            "Create a link, print it, and publish messages through it.\n\n"
            "A link is a short name for a key, a channel and its options. It exists as long\n"
            "as its connection, so it ends with the command. The broker checks the key when\n"
            "a message is published, not when the link is created.\n\n"
            f"{DURATION_HELP}"
        ),
        examples=("  %(prog)s a1 chat/ hello\n  seq 100 | %(prog)s a1 chat/ - --ttl 1m"),
    )
    parser.add_argument(
        "name", type=_link_name, metavar="NAME", help="one or two letters or digits"
    )
    _add_channel(parser)
    _add_message(parser)
    _add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the link as JSON")
    add_source(parser, key="key with permission w", secret=SECRET_HELP)


def _add_channel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "channel",
        type=arguments_.channel,
        metavar="CHANNEL",
        help="channel, such as chat/ or chat/room/",
    )


def _add_message(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "message",
        nargs="?",
        metavar="MESSAGE",
        help="text to publish, or '-' for each line of stdin",
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ttl",
        type=arguments_.ttl,
        metavar="SEC",
        help="store for this time (needs permission s)",
    )
    parser.add_argument(
        "--no-echo",
        dest="echo",
        action="store_false",
        help="do not deliver to this connection",
    )


def _link_name(text: str) -> str:
    if not re.fullmatch("[0-9A-Za-z]{1,2}", text):
        raise argparse.ArgumentTypeError("expected one or two letters or digits")
    return text


def _speed(text: str) -> float:
    try:
        return arguments_.duration(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError("expected a number of at least 0") from None


def _permissions(arguments: argparse.Namespace) -> str:
    return "ws" if arguments.ttl or getattr(arguments, "retain", False) else "w"


async def _pub(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    lines_of = _lines_to_publish(arguments)
    interval: float | None = arguments.interval
    payload, number = b"", math.inf
    if lines_of is None:
        read = arguments.file is not None
        payload = await read_all(arguments.file) if read else _encode(arguments.message)
        number = arguments.count or (1 if interval is None else math.inf)
    qos: Literal[0, 1] | None = arguments.qos
    if qos is None:
        qos = 1 if number == 1 else 0
    target = arguments.channel if arguments.replay is None else f"{arguments.channel}#/"
    async with stay_connected(source) as emitter:
        key = source.key_for(emitter, _permissions(arguments), target)

        async def publish(message: Outgoing) -> None:
            await emitter.publish(
                key,
                message.channel,
                message.binary,
                arguments.ttl,
                qos=qos,
                retain=arguments.retain,
                echo=arguments.echo,
            )

        if lines_of is None:
            total = arguments.count or 0
        else:
            total = await remaining_bytes(lines_of)
        title = f"publishing to {arguments.channel}"
        with progress(title, total, size=lines_of is not None) as advance:
            if arguments.replay is not None:
                messages = recorded(arguments.replay, arguments.channel, arguments.speed, advance)
            elif lines_of is not None:
                messages = each_line(arguments.channel, advance)
            else:
                messages = repeated(Outgoing(arguments.channel, payload), number, advance)
            try:
                published = await _publish_all(emitter, spaced(messages, interval), publish)
            except RequestError as exc:
                if qos == 1:
                    raise
                # The error's own text suggests changes to a program.
                raise CommandError(
                    f"cannot publish to {arguments.channel!r}: {exc.status} {exc.message}; use "
                    "--qos 1 to see which message was refused, and likely reasons"
                ) from exc
    uncertain = emitter.statistics().uncertain
    if uncertain:
        raise CommandError(
            f"cannot confirm {uncertain} of {counted(published, 'message')}: the connection was "
            "lost while they were being sent; use --qos 1 to see which the broker accepted"
        )
    hint(f"published {counted(published, 'message')} to {arguments.channel}")


def _lines_to_publish(arguments: argparse.Namespace) -> str | None:
    """
    Check which messages to publish.

    :return: the name of the input if each of its lines is a message, otherwise ``None``
    """
    given = [
        words
        for words, value in (
            ("a message", arguments.message),
            ("--file", arguments.file),
            ("--replay", arguments.replay),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise UsageError(f"give {given[0]} or {given[1]}, not both")
    if arguments.speed is not None and arguments.replay is None:
        raise UsageError("--speed requires --replay")
    if arguments.interval is not None and arguments.replay is not None:
        raise UsageError("cannot use --interval with --replay; use --speed")
    if arguments.file is not None or arguments.message not in (None, STDIN):
        return None
    if arguments.count is not None:
        raise UsageError("--count requires a message or --file")
    name: str = STDIN if arguments.replay is None else arguments.replay
    return name


async def _link(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    async with connect_once(source) as emitter:
        key = source.key_for(emitter, _permissions(arguments), arguments.channel)
        link = await emitter.link(
            key, arguments.channel, arguments.name, ttl=arguments.ttl, echo=arguments.echo
        )
        if arguments.json:
            print_line(to_json({"name": link.name, "channel": link.channel}))
        else:
            print_line(f"{link.name} {link.channel}")
        if arguments.message is not None:

            async def publish(message: Outgoing) -> None:
                await emitter.publish_with_link(link.name, message.binary, qos=1)

            if arguments.message == STDIN:
                messages = each_line(arguments.channel)
            else:
                messages = repeated(Outgoing(arguments.channel, _encode(arguments.message)), 1)
            await _publish_all(emitter, messages, publish)


async def _publish_all(
    emitter: Emitter,
    messages: AsyncGenerator[Outgoing],
    publish: Callable[[Outgoing], Awaitable[None]],
) -> int:
    """Publish all messages or raise the first refusal, and return the number of messages."""
    refusals: list[Exception] = []
    number = 0
    with anyio.CancelScope() as scope:

        @emitter.on("error")
        def give_up(error: Exception) -> None:
            # The refusal of a qos=0 message might arrive while the next line is awaited.
            refusals.append(error)
            scope.cancel()

        async with aclosing(messages):
            async for message in messages:
                number += 1
                try:
                    await publish(message)
                except MessageTooLargeError as exc:
                    raise CommandError(f"message {number}: {exc}") from exc
        while True:
            try:
                await emitter.flush()
                break
            except ConnectionLostError:
                # Messages lost with the connection are counted as uncertain. Flush the next
                # connection; if the client does not reconnect, it cancels this block here.
                await checkpoint()
    if refusals:
        raise refusals[0]
    return number


def _encode(message: str) -> bytes:
    return message.encode(errors="surrogateescape")
