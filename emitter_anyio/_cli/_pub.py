"""The commands ``pub`` and ``link``, which publish messages."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Literal

import anyio
from anyio import to_thread
from anyio.lowlevel import checkpoint

from emitter_anyio import ConnectionLostError, Emitter, MessageTooLargeError, RequestError

from . import _arguments as arguments_
from ._arguments import CommandError, Commands, UsageError, add_command
from ._formats import to_json
from ._input import chunks, lines
from ._output import counted, hint, is_terminal, print_line
from ._source import SECRET_HELP, Source, add_source, connect_once, stay_connected


def add_pub(commands: Commands) -> None:
    """Add ``pub``."""
    parser = add_command(
        commands,
        "pub",
        _pub,
        arguments="CHANNEL [MESSAGE]",
        help="publish messages",
        description=(
            "Publish a message, each line of standard input, or a file.\n\n"
            "The command ends when the broker has read every message. It fails if the broker\n"
            "refused one. With --qos 1, each message waits until the broker has accepted the\n"
            "one before; this is the default, except for lines of standard input."
        ),
        examples=(
            "  %(prog)s chat/ hello\n"
            "  %(prog)s chat/ hello --ttl 3600      # store the message for an hour\n"
            "  tail -f log | %(prog)s chat/         # each line is a message\n"
            "  %(prog)s chat/ --file picture.png    # the file is one message"
        ),
    )
    _add_channel(parser)
    _add_message(parser)
    parser.add_argument(
        "-f", "--file", metavar="FILE", help="publish a file, or all of stdin with '-'"
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


def add_link(commands: Commands) -> None:
    """Add ``link``."""
    parser = add_command(
        commands,
        "link",
        _link,
        arguments="NAME CHANNEL [MESSAGE]",
        help="create a link and publish through it",
        description=(
            "Create a link, print it, and publish messages through it.\n\n"
            "A link is a short name for a key, a channel and its options. It\n"
            "exists as long as its connection, so it ends with the command. The broker\n"
            "checks the key when a message is published, not when the link is created."
        ),
        examples=("  %(prog)s a1 chat/ hello\n  seq 100 | %(prog)s a1 chat/ - --ttl 60"),
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
        type=arguments_.count,
        metavar="SECONDS",
        help="store for this time (needs permission s)",
    )
    parser.add_argument(
        "--no-echo",
        dest="echo",
        action="store_false",
        help="do not deliver to this connection itself",
    )


def _link_name(text: str) -> str:
    if not re.fullmatch("[0-9A-Za-z]{1,2}", text):
        raise argparse.ArgumentTypeError("expected one or two letters or digits")
    return text


def _permissions(arguments: argparse.Namespace) -> str:
    return "ws" if arguments.ttl or getattr(arguments, "retain", False) else "w"


async def _pub(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    if arguments.file is not None and arguments.message is not None:
        raise UsageError("give a message or --file, not both")
    message = "-" if arguments.message is None else arguments.message
    messages = _lines(message) if arguments.file is None else _file(arguments.file)
    qos: Literal[0, 1] | None = arguments.qos
    if qos is None:
        qos = 0 if arguments.file is None and message == "-" else 1
    async with stay_connected(source) as emitter:
        key = source.key_for(emitter, _permissions(arguments), arguments.channel)

        async def publish(message: bytes) -> None:
            await emitter.publish(
                key,
                arguments.channel,
                message,
                arguments.ttl,
                qos=qos,
                retain=arguments.retain,
                echo=arguments.echo,
            )

        try:
            number = await _publish_all(emitter, messages, publish)
        except RequestError as exc:
            if qos == 1:
                raise
            # The error's own text suggests changes to a program.
            raise CommandError(
                f"cannot publish to {arguments.channel!r}: {exc.status} {exc.message}; use --qos 1 "
                "to see which message was refused, and likely reasons"
            ) from exc
    uncertain = emitter.statistics().uncertain
    if uncertain:
        raise CommandError(
            f"cannot confirm {uncertain} of {counted(number, 'message')}: the connection was lost "
            "while they were being sent; use --qos 1 to see which the broker accepted"
        )
    hint(f"published {counted(number, 'message')} to {arguments.channel}")


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

            async def publish(message: bytes) -> None:
                await emitter.publish_with_link(link.name, message, qos=1)

            await _publish_all(emitter, _lines(arguments.message), publish)


async def _publish_all(
    emitter: Emitter,
    messages: AsyncGenerator[bytes],
    publish: Callable[[bytes], Awaitable[None]],
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


async def _lines(message: str) -> AsyncGenerator[bytes]:
    """Yield the message, or the lines of standard input if it is ``-``."""
    if message != "-":
        yield message.encode(errors="surrogateescape")
        return
    if is_terminal(sys.stdin):
        hint("publishing each line as a message; press Ctrl-D to finish")
    async with aclosing(lines()) as read:
        async for line in read:
            yield line


async def _file(name: str) -> AsyncGenerator[bytes]:
    """Yield the content of a file, or of standard input if its name is ``-``."""
    if name == "-":
        yield b"".join([chunk async for chunk in chunks()])
        return
    try:
        yield await to_thread.run_sync(Path(name).read_bytes)
    except OSError as exc:
        raise CommandError(f"cannot read {name}: {exc.strerror or exc}") from exc
