"""The commands ``keygen``, ``ban``, ``unban`` and ``me``."""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentTypeError
from contextlib import aclosing

from emitter_anyio import NotFoundError

from . import _arguments as arguments_
from ._arguments import DURATION_HELP, CommandError, Parser, UsageError
from ._formats import to_json
from ._input import lines
from ._output import hint, is_terminal, note, print_line
from ._source import Source, add_source, connect_once


def add_keygen(parser: Parser) -> None:
    """Add the arguments of ``keygen``."""
    parser.set_command(
        _keygen,
        arguments="CHANNEL [PERMISSIONS]",
        description=(
            "Generate a channel key and print it.\n\n"
            "A key for chat/ is valid for that channel, and for a subscription that includes\n"
            "the channels below it. A key for chat/#/ is also valid for each channel below.\n\n"
            "Permissions: r read, w write, s store, l load, p presence, e extend, x execute.\n\n"
            "With an extend key (--key), the new key is for a private channel below CHANNEL.\n"
            "This command does not read EMITTER_KEY.\n\n"
            f"{DURATION_HELP}"
        ),
        examples=(
            "  %(prog)s chat/    # read and write\n"
            "  %(prog)s chat/#/ rwslp --ttl 1h\n"
            "  export EMITTER_KEY=$(%(prog)s chat/)\n\n"
            "  # a private channel\n"
            "  %(prog)s rooms/ rw --key KEY"
        ),
    )
    parser.add_argument(
        "channel",
        type=arguments_.target,
        metavar="CHANNEL",
        help="channel, such as chat/ or chat/#/",
    )
    parser.add_argument(
        "permissions",
        nargs="?",
        type=_permissions,
        default="rw",
        metavar="PERMISSIONS",
        help="letters out of rwslpex (default: %(default)s)",
    )
    parser.add_argument(
        "--ttl",
        type=arguments_.ttl,
        default=0,
        metavar="SEC",
        help="lifetime of the key (default: unlimited)",
    )
    parser.add_argument("--json", action="store_true", help="print key and channel as JSON")
    parser.add_argument(
        "-k", "--key", type=arguments_.key, help="extend key to use instead of --secret"
    )
    add_source(parser, secret="secret key")


def add_ban(parser: Parser) -> None:
    """Add the arguments of ``ban``."""
    _add_ban(
        parser,
        banned=True,
        description=(
            "Ban a channel key.\n\n"
            "Clients that subscribed with it stay subscribed until their connection ends."
        ),
    )


def add_unban(parser: Parser) -> None:
    """Add the arguments of ``unban``."""
    _add_ban(
        parser,
        banned=False,
        description=(
            "Lift the ban on a channel key.\n\n"
            "The broker might refuse the key for up to another minute."
        ),
    )


def _add_ban(parser: Parser, *, banned: bool, description: str) -> None:
    parser.set_command(
        _ban,
        arguments="[KEY]",
        description=description,
        examples="  %(prog)s KEY\n  %(prog)s < key.txt    # keep the key out of ps",
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="KEY",
        help="channel key (default: read a line of standard input)",
    )
    parser.set_defaults(banned=banned)
    add_source(parser, secret="secret key")


def add_me(parser: Parser) -> None:
    """Add the arguments of ``me``."""
    parser.set_command(
        _me,
        description=(
            "Connect and print the id that the broker gave the connection.\n\n"
            "The id is new each time. Use this command to check that the broker replies."
        ),
        examples="  %(prog)s\n  %(prog)s --json",
    )
    parser.add_argument("--json", action="store_true", help="print id and links as JSON")
    add_source(parser)


def _permissions(text: str) -> str:
    if set(text) - set("rwslpex"):
        raise ArgumentTypeError("expected letters out of r, w, s, l, p, e and x")
    return text


async def _keygen(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    source_key: str = arguments.key or source.needed_secret()
    async with connect_once(source) as emitter:
        made = await emitter.keygen(
            source_key, arguments.channel, arguments.permissions, arguments.ttl
        )
    if arguments.json:
        print_line(to_json({"key": made.key, "channel": made.channel}))
        return
    print_line(made.key)
    if made.channel != arguments.channel:
        note(f"the key is for {made.channel}")


async def _ban(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    secret = source.needed_secret()
    target: str | None = arguments.target
    if target is None:
        if is_terminal(sys.stdin):
            hint("enter the channel key")
        async with aclosing(lines()) as read:
            target = (await anext(read, b"")).decode(errors="replace").strip()
    if not target:
        raise UsageError("missing key: give it as an argument or on standard input")
    async with connect_once(source) as emitter:
        try:
            banned = await emitter.keyban(secret, target, arguments.banned)
        except NotFoundError:
            # Emitter fails in this request if it has no cluster, and closes the connection.
            raise CommandError(
                "cannot ban keys: the broker is configured without a cluster, which it requires "
                "for bans, even for a single node"
            ) from None
        except ValueError as exc:
            raise UsageError(str(exc)) from None
    print_line("banned" if banned else "not banned")


async def _me(arguments: argparse.Namespace) -> None:
    async with connect_once(arguments.source) as emitter:
        me = await emitter.me()
    print_line(to_json({"id": me.id, "links": dict(me.links)}) if arguments.json else me.id)
