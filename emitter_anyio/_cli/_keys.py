"""``keygen``, ``ban`` and ``unban``; and ``me``."""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentTypeError
from contextlib import aclosing

from . import _arguments as arguments_
from ._arguments import Commands, UsageError, add_command
from ._formats import to_json
from ._input import lines
from ._output import hint, is_terminal, note, say
from ._source import Source, add_source, asking


def add_keygen(commands: Commands) -> None:
    """Add ``keygen``."""
    parser = add_command(
        commands,
        "keygen",
        _keygen,
        help="make a key for a channel",
        description=(
            "Have the broker make a key, and print it. chat/ opens just that channel (and "
            "subscribing to all below\nit), chat/#/ all below it too. Permissions are letters: r "
            "read, w write, s store, l load, p presence,\ne extend, x execute."
        ),
        examples=(
            "  %(prog)s chat/                       # to read and write\n"
            "  %(prog)s chat/#/ rwslp --ttl 3600    # good for an hour\n"
            "  export EMITTER_KEY=$(%(prog)s chat/)\n"
            "  %(prog)s rooms/ rw --key KEY         # of an extend key: a private channel"
        ),
    )
    parser.add_argument("channel", type=arguments_.target, help="such as chat/ or chat/#/")
    parser.add_argument(
        "permissions",
        nargs="?",
        type=_permissions,
        default="rw",
        help="letters out of rwslpex (default: %(default)s)",
    )
    parser.add_argument(
        "--ttl",
        type=arguments_.count,
        default=0,
        metavar="SECONDS",
        help="for how long it is good (default: for ever)",
    )
    parser.add_argument("--json", action="store_true", help="print key and channel as JSON")
    parser.add_argument(
        "-k",
        "--key",
        type=arguments_.key,
        help="instead of the secret, a key that may extend (e): it makes a key for a private "
        "channel below the given one. EMITTER_KEY, which is for other commands, is not looked at",
    )
    add_source(parser, secret="the broker's secret")


def add_ban(commands: Commands) -> None:
    """Add ``ban`` and ``unban``."""
    for command, what, more in (
        ("ban", "ban a key", "Who is subscribed with it stays so until the link ends."),
        ("unban", "take a ban back", "A broker may go on refusing the key for about a minute."),
    ):
        parser = add_command(
            commands,
            command,
            _ban,
            help=what,
            description=f"Have the broker {what}. {more}",
            examples=("  %(prog)s KEY\n  %(prog)s < key.txt      # so that nobody sees it in ps"),
        )
        parser.add_argument(
            "target",
            nargs="?",
            metavar="KEY",
            help="the key in question (default: a line of standard input)",
        )
        parser.set_defaults(banned=command == "ban")
        add_source(parser, secret="the broker's secret")


def add_me(commands: Commands) -> None:
    """Add ``me``."""
    parser = add_command(
        commands,
        "me",
        _me,
        help="ask the broker who we are",
        description=(
            "Ask the broker what it knows of this connection, and print its id, which is new each "
            "time: an easy\nway to see that the broker answers."
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
    async with asking(source) as emitter:
        made = await emitter.keygen(
            source_key, arguments.channel, arguments.permissions, arguments.ttl
        )
    if arguments.json:
        say(to_json({"key": made.key, "channel": made.channel}))
        return
    say(made.key)
    if made.channel != arguments.channel:
        note(f"it opens {made.channel}")


async def _ban(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    secret = source.needed_secret()
    target: str | None = arguments.target
    if target is None:
        if is_terminal(sys.stdin):
            hint("the key, please")
        async with aclosing(lines()) as read:
            target = (await anext(read, b"")).decode(errors="replace").strip()
    if not target:
        raise UsageError("no key came on standard input")
    async with asking(source) as emitter:
        try:
            banned = await emitter.keyban(secret, target, arguments.banned)
        except ValueError as exc:
            raise UsageError(str(exc)) from None
    say("banned" if banned else "not banned")


async def _me(arguments: argparse.Namespace) -> None:
    async with asking(arguments.source) as emitter:
        me = await emitter.me()
    say(to_json({"id": me.id, "links": dict(me.links)}) if arguments.json else me.id)
