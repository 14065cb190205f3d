"""The argument parser, the types of arguments, and the errors for invalid ones."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Coroutine
from datetime import datetime
from functools import partial
from typing import Any, Final, NoReturn, TypeAlias, get_args

from emitter_anyio import InvalidChannelError, connect
from emitter_anyio._values.channels import (
    check_channel,
    check_group,
    check_key,
    check_target,
    unix_seconds,
)
from emitter_anyio._values.checks import check_optional_int
from emitter_anyio._values.router import Matcher, find_parent

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
Run: TypeAlias = Callable[[argparse.Namespace], Coroutine[Any, Any, None]]

NAME: Final = "emitter-anyio"

TIME_HELP: Final = (
    "TIME is an age (10m, 2h or 1d), a local date and time (2030-01-31T12:00) or a\nUnix timestamp."
)

_UNIT_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd])", re.ASCII)

_HELP_COLUMN: Final = 28
"""The column at which the help of options begins, so that each option takes one line."""


class CommandError(Exception):
    """A failure of a command, described in one line."""


class UsageError(Exception):
    """An invalid command line that argparse cannot detect."""


# argparse repeats values in its messages. A value might be a secret in the wrong place.
_VALUES_IN_MESSAGES: Final = (
    (r"unrecognized arguments: (--[a-z-]+).*", r"unrecognized option \1"),
    (r"unrecognized arguments: .*", "unrecognized arguments"),
    (r"invalid choice: .*\(", "invalid choice ("),
    (r"invalid \w+ value: .*", "invalid value"),
    (r"ambiguous option: ([^= ]*).* could match", r"ambiguous option: \1 could match"),
    (r"ignored explicit argument .*", "takes no value"),
)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, without the values."""

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage before the message.
        if message.endswith("expected one argument"):
            message += "; if its value begins with '-', write --option=VALUE"
        for pattern, replacement in _VALUES_IN_MESSAGES:
            message = re.sub(pattern, replacement, message, flags=re.DOTALL)
        self.exit(2, f"{NAME}: {message} (see {self.prog} --help)\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A formatter that leaves enough space for the names of options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_HELP_COLUMN)


def add_command(
    commands: Commands,
    name: str,
    run: Run,
    *,
    arguments: str = "",
    help: str,
    description: str,
    examples: str,
) -> Parser:
    """
    Add a command, with the options that all commands have.

    :param arguments: the positional arguments, as the usage shows them
    """
    parser = commands.add_parser(
        name,
        usage=f"%(prog)s [options] {arguments}".rstrip(),
        help=help,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--backend",
        choices=["asyncio", "trio"],
        default="asyncio",
        metavar="NAME",
        help="asyncio or trio (default: %(default)s)",
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_matcher(parser: Parser) -> None:
    """Add the option ``--matcher``."""
    parser.add_argument(
        "--matcher",
        choices=get_args(Matcher),
        default="emitter",
        metavar="NAME",
        help="the broker's: emitter or mqtt (default: %(default)s)",
    )


def check_matcher(channel: str, matcher: Matcher) -> None:
    """
    Check that the broker delivers to a channel.

    :raises UsageError: if it never does
    """
    if (parent := find_parent(channel, matcher)) is not None:
        raise UsageError(
            f"Emitter delivers nothing to '#'; use {parent}, which includes all channels below it, "
            "or --matcher mqtt if the broker is configured with that matcher"
        )


def url(text: str) -> str:
    """Parse a URL that ``connect()`` accepts."""
    try:
        connect(text)
    except (TypeError, ValueError, ImportError) as exc:
        # argparse's own message would show the URL, which might contain a password.
        raise argparse.ArgumentTypeError(str(exc)) from None
    return text


def username(text: str) -> str:
    """Parse a user name that ``connect()`` accepts."""
    try:
        connect(username=text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
    return text


def key(text: str) -> str:
    """Parse a channel key or a secret key."""
    try:
        return check_key(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def channel(text: str) -> str:
    """Parse a channel without wildcards."""
    return _checked(text, check_channel)


def pattern(text: str) -> str:
    """Parse a channel that may contain wildcards."""
    return _checked(text, partial(check_channel, wildcards=True))


def target(text: str) -> str:
    """Parse the channel that a key is generated for."""
    return _checked(text, check_target)


def group(text: str) -> str:
    """Parse the name of a share group."""
    return _checked(text, check_group)


def _checked(text: str, check: Callable[[str], str]) -> str:
    try:
        return check(text)
    except InvalidChannelError as exc:
        # The text might be a key or a URL in the wrong place.
        raise argparse.ArgumentTypeError(str(exc).replace(f" {text!r}", "", 1)) from None


def port(text: str) -> int:
    """Parse a port number, or 0."""
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError("expected a port from 0 to 65535")


def count(text: str) -> int:
    """Parse an integer in the range that the broker accepts."""
    try:
        whole = int(text) if text.isascii() and text.isdigit() else -1
        check_optional_int("the number", whole)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {2**31 - 1}") from None
    return whole


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if (whole := count(text)) == 0:
        raise argparse.ArgumentTypeError("expected an integer of at least 1")
    return whole


def seconds(text: str) -> float:
    """Parse a number of seconds."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if number >= 0:
        return number
    raise argparse.ArgumentTypeError("expected a number of seconds")


def period(text: str) -> float:
    """Parse a number of seconds greater than 0."""
    if (number := seconds(text)) == 0:
        raise argparse.ArgumentTypeError("expected more than 0 seconds")
    return number


def moment(text: str) -> float:
    """Parse a time: an age, Unix seconds, or a date with or without a time."""
    try:
        if age := _AGE.fullmatch(text):
            seconds = time.time() - float(age[1]) * _UNIT_SECONDS[age[2]]
        elif text.isdigit():
            seconds = float(text)
        else:
            seconds = datetime.fromisoformat(text).timestamp()
        unix_seconds("the time", seconds)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            "expected a time from 2018 to 2066, such as 10m (s, m, h or d ago), "
            "2030-01-31T12:00 or Unix seconds"
        ) from None
    return seconds
