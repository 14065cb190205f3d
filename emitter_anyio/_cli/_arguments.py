"""What command lines are made of: the parser, the kinds of values, and how a wrong one is told."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Any, Final, NoReturn, TypeAlias

from emitter_anyio import InvalidChannelError, connect
from emitter_anyio._channels import check_channel, check_group, check_target
from emitter_anyio._checks import check_whole

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
Run: TypeAlias = Callable[[argparse.Namespace], Coroutine[Any, Any, None]]

NAME: Final = "emitter-anyio"

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])", re.ASCII)


class CommandError(Exception):
    """Why a command failed, in one line."""


class UsageError(Exception):
    """What is wrong with a command line, where argparse cannot tell."""


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line that show no password."""

    def error(self, message: str) -> NoReturn:
        # argparse would put the usage before it, several lines long.
        if message.endswith("expected one argument"):
            message += "; if its value begins with '-', write --option=VALUE"
        # What it repeats may be a URL in a wrong place, with a password.
        message = re.sub(r"://\S*@", "://…@", message)
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


def channel(text: str) -> str:
    """Take a channel without wildcards."""
    return _checked(lambda: check_channel(text))


def pattern(text: str) -> str:
    """Take a channel that may have wildcards."""
    return _checked(lambda: check_channel(text, wildcards=True))


def target(text: str) -> str:
    """Take what a key can be made for."""
    return _checked(lambda: check_target(text))


def group(text: str) -> str:
    """Take the name of a share group."""
    return _checked(lambda: check_group(text))


def _checked(check: Callable[[], str]) -> str:
    try:
        return check()
    except InvalidChannelError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def port(text: str) -> int:
    """Take a port, or 0."""
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port from 0 to 65535")


def count(text: str) -> int:
    """Take a whole number that the broker takes, too."""
    try:
        whole = int(text) if text.isascii() and text.isdigit() else -1
        check_whole("the number", whole)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text[:32]!r} is no whole number from 0 to {2**31 - 1}"
        ) from None
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
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")


def period(text: str) -> float:
    """Take a number of seconds that is not 0."""
    if (number := seconds(text)) == 0:
        raise argparse.ArgumentTypeError("0 seconds are too few")
    return number


def moment(text: str) -> float:
    """Take a time: a span before now, unix seconds, or a date with or without a time."""
    if ago := _AGO.fullmatch(text):
        return time.time() - float(ago[1]) * _UNITS[ago[2]]
    try:
        return float(text) if text.isdigit() else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time: write 10m (s, m, h or d ago), 2030-01-31T12:00 or unix seconds"
        ) from None
