"""``pub``, and ``link``, which publishes too."""

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
from ._output import hint, is_terminal, say
from ._source import TO_MAKE_A_KEY, Source, add_source, asking, lasting


def add_pub(commands: Commands) -> None:
    """Add ``pub``."""
    parser = add_command(
        commands,
        "pub",
        _pub,
        help="publish messages",
        description=(
            "Publish a message, or each line of standard input, or a file. It ends when the broker "
            "has taken\nall, and fails if the broker refused one. With --qos 0 messages follow "
            "each other without waiting;\nwith --qos 1 each waits until the broker has accepted "
            "the one before it."
        ),
        examples=(
            "  %(prog)s chat/ hello\n"
            "  %(prog)s chat/ hello --ttl 3600      # stored for an hour\n"
            "  tail -f log | %(prog)s chat/         # each line is a message\n"
            "  %(prog)s chat/ --file picture.png    # all of a file; '-' is standard input"
        ),
    )
    parser.add_argument("channel", type=arguments_.channel, help="such as chat/ or chat/room/")
    _add_message(parser)
    parser.add_argument(
        "-f", "--file", metavar="FILE", help="publish all of this file as one message"
    )
    _add_options(parser)
    parser.add_argument(
        "-q",
        "--qos",
        type=int,
        choices=(0, 1),
        help="1: wait for each message until the broker has accepted it (default: 1, and 0 for "
        "the lines of standard input)",
    )
    parser.add_argument(
        "-r",
        "--retain",
        action="store_true",
        help="store it for as long as the broker keeps messages (the key needs 's')",
    )
    add_source(
        parser,
        key="a key that permits to write (w)",
        secret=TO_MAKE_A_KEY,
    )


def add_link(commands: Commands) -> None:
    """Add ``link``."""
    parser = add_command(
        commands,
        "link",
        _link,
        help="make a link, and publish through it",
        description=(
            "Make a link, a name of one or two letters that stands for key, channel and options, "
            "print it, and\npublish through it: a message, or with '-' each line of standard "
            "input. A link lasts only as long as\nits connection, so it ends with the command. The "
            "broker looks at the key when the link is used."
        ),
        examples=("  %(prog)s a1 chat/ hello\n  seq 100 | %(prog)s a1 chat/ - --ttl 60"),
    )
    parser.add_argument("name", type=_link_name, help="one or two letters or digits")
    parser.add_argument("channel", type=arguments_.channel, help="such as chat/ or chat/room/")
    _add_message(parser)
    _add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the link as JSON")
    add_source(
        parser,
        key="a key that permits to write (w)",
        secret=TO_MAKE_A_KEY,
    )


def _add_message(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "message",
        nargs="?",
        help="what to publish; '-' publishes each line of standard input",
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ttl",
        type=arguments_.count,
        metavar="SECONDS",
        help="store it for so long (the key needs 's')",
    )
    parser.add_argument(
        "--no-echo",
        dest="echo",
        action="store_false",
        help="do not deliver it to this connection itself",
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
    messages = _each(message) if arguments.file is None else _whole(arguments.file)
    qos: Literal[0, 1] | None = arguments.qos
    if qos is None:
        qos = 0 if arguments.file is None and message == "-" else 1
    async with lasting(source) as emitter:
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
            # Its own words are for programmers.
            raise CommandError(
                f"publish {arguments.channel!r}: {exc.status} {exc.message} (--qos 1 tells which "
                "message, and what may be the reason)"
            ) from exc
    uncertain = emitter.statistics().uncertain
    if uncertain:
        raise CommandError(
            f"{uncertain} of {number} messages were under way when the link was lost: the broker "
            "may have taken them or not (--qos 1 would tell which)"
        )
    hint(f"published {number} to {arguments.channel}")


async def _link(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    async with asking(source) as emitter:
        key = source.key_for(emitter, _permissions(arguments), arguments.channel)
        link = await emitter.link(
            key, arguments.channel, arguments.name, ttl=arguments.ttl, echo=arguments.echo
        )
        if arguments.json:
            say(to_json({"name": link.name, "channel": link.channel}))
        else:
            say(f"{link.name} {link.channel}")
        if arguments.message is not None:

            async def publish(message: bytes) -> None:
                await emitter.publish_with_link(link.name, message, qos=1)

            await _publish_all(emitter, _each(arguments.message), publish)


async def _publish_all(
    emitter: Emitter,
    messages: AsyncGenerator[bytes],
    publish: Callable[[bytes], Awaitable[None]],
) -> int:
    """Publish, until the first refusal at the latest; give how many there were."""
    refusals: list[Exception] = []
    number = 0
    with anyio.CancelScope() as scope:

        @emitter.on("error")
        def give_up(error: Exception) -> None:
            # A refusal of qos=0 comes when we may be waiting for another line.
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
                # Asked again on the next link: what was lost with this one is counted. If there is
                # none, we are cancelled here.
                await checkpoint()
    if refusals:
        raise refusals[0]
    return number


async def _each(message: str) -> AsyncGenerator[bytes]:
    if message != "-":
        yield message.encode(errors="surrogateescape")
        return
    if is_terminal(sys.stdin):
        hint("each line is a message; Ctrl-D ends")
    async with aclosing(lines()) as read:
        async for line in read:
            yield line


async def _whole(name: str) -> AsyncGenerator[bytes]:
    if name == "-":
        yield b"".join([chunk async for chunk in chunks()])
        return
    try:
        yield await to_thread.run_sync(Path(name).read_bytes)
    except OSError as exc:
        raise CommandError(f"cannot read {name}: {exc.strerror or exc}") from exc
