"""What command lines are made of: the parser, the kinds of values, and how a wrong one is told."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Coroutine
from datetime import datetime
from functools import partial
from typing import Any, Final, NoReturn, TypeAlias

from emitter_anyio import InvalidChannelError, connect
from emitter_anyio._values.channels import (
    check_channel,
    check_group,
    check_key,
    check_target,
    unix_seconds,
)
from emitter_anyio._values.checks import check_optional_int

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
Run: TypeAlias = Callable[[argparse.Namespace], Coroutine[Any, Any, None]]

NAME: Final = "emitter-anyio"

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])", re.ASCII)


class CommandError(Exception):
    """Why a command failed, in one line."""


class UsageError(Exception):
    """What is wrong with a command line, where argparse cannot tell."""


# What argparse's messages repeat of a command line might be a secret in the wrong place.
_ECHOES: Final = (
    (r"unrecognized arguments: (--[a-z-]+).*", r"unrecognized option \1"),
    (r"unrecognized arguments: .*", "unrecognized arguments"),
    (r"invalid choice: .*\(", "invalid choice ("),
    (r"invalid \w+ value: .*", "invalid value"),
    (r"ambiguous option: ([^= ]*).* could match", r"ambiguous option: \1 could match"),
    (r"ignored explicit argument .*", "takes no value"),
)


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line that repeat no value."""

    def error(self, message: str) -> NoReturn:
        # argparse would put the usage before it, several lines long.
        if message.endswith("expected one argument"):
            message += "; if its value begins with '-', write --option=VALUE"
        for echo, replacement in _ECHOES:
            message = re.sub(echo, replacement, message, flags=re.DOTALL)
        self.exit(2, f"{NAME}: {message} (see {self.prog} --help)\n")


def add_command(
    commands: Commands, name: str, run: Run, *, help: str, description: str, examples: str
) -> Parser:
    """Add a command, with what all commands have."""
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--backend",
        choices=["asyncio", "trio"],
        default="asyncio",
        help="the event loop to run on (default: %(default)s)",
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def url(text: str) -> str:
    """Take what ``connect()`` takes as a URL."""
    try:
        connect(text)
    except (TypeError, ValueError, ImportError) as exc:
        # argparse's own message would show the URL, which may carry a password.
        raise argparse.ArgumentTypeError(str(exc)) from None
    return text


def username(text: str) -> str:
    """Take what ``connect()`` takes as a user name."""
    try:
        connect(username=text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
    return text


def key(text: str) -> str:
    """Take a key, or the secret."""
    try:
        return check_key(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def channel(text: str) -> str:
    """Take a channel without wildcards."""
    return _checked(text, check_channel)


def pattern(text: str) -> str:
    """Take a channel that may have wildcards."""
    return _checked(text, partial(check_channel, wildcards=True))


def target(text: str) -> str:
    """Take what a key can be made for."""
    return _checked(text, check_target)


def group(text: str) -> str:
    """Take the name of a share group."""
    return _checked(text, check_group)


def _checked(text: str, check: Callable[[str], str]) -> str:
    try:
        return check(text)
    except InvalidChannelError as exc:
        # A key or a URL in a channel's place must not be repeated.
        raise argparse.ArgumentTypeError(str(exc).replace(f" {text!r}", "", 1)) from None


def port(text: str) -> int:
    """Take a port, or 0."""
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError("expected a port from 0 to 65535")


def count(text: str) -> int:
    """Take a whole number that the broker takes, too."""
    try:
        whole = int(text) if text.isascii() and text.isdigit() else -1
        check_optional_int("the number", whole)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {2**31 - 1}") from None
    return whole


def positive(text: str) -> int:
    """Take a whole number of at least one."""
    if (whole := count(text)) == 0:
        raise argparse.ArgumentTypeError("there is nothing to do for 0")
    return whole


def seconds(text: str) -> float:
    """Take a number of seconds."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if number >= 0:
        return number
    raise argparse.ArgumentTypeError("expected a number of seconds")


def period(text: str) -> float:
    """Take a number of seconds that is not 0."""
    if (number := seconds(text)) == 0:
        raise argparse.ArgumentTypeError("0 seconds are too few")
    return number


def moment(text: str) -> float:
    """Take a time: a span before now, unix seconds, or a date with or without a time."""
    try:
        if ago := _AGO.fullmatch(text):
            seconds = time.time() - float(ago[1]) * _UNITS[ago[2]]
        elif text.isdigit():
            seconds = float(text)
        else:
            seconds = datetime.fromisoformat(text).timestamp()
        unix_seconds("the time", seconds)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            "expected a time from 2018 to 2066: 10m (s, m, h or d ago), 2030-01-31T12:00 or unix "
            "seconds"
        ) from None
    return seconds
