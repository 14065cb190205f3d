"""The argument parser, the types of arguments, and the errors for invalid ones."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Coroutine, Sequence
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

Run: TypeAlias = Callable[[argparse.Namespace], Coroutine[Any, Any, None]]

NAME: Final = "emitter-anyio"

DEFAULT_URL: Final = "mqtt://127.0.0.1:8080"

MAX_MESSAGE_BYTES: Final = 65536
"""The maximum size of a message that brokers accept by default, with its topic."""

TIME_HELP: Final = (
    "TIME is an age (10m, 2h or 1d), a local date and time (2030-01-31T12:00) or a\nUnix timestamp."
)

DURATION_HELP: Final = "SEC is a number of seconds, or a duration such as 10m, 2h or 1d."

_UNIT_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)", re.ASCII)

_HOST_AND_PORT: Final = re.compile(r"([^\s:/@?#]+|\[[^\s/@?#]+\]):\d+", re.ASCII)

_HELP_COLUMN: Final = 28
"""The column at which the help of options begins, so that each option takes one line."""


class CommandError(Exception):
    """A failure of a command, described in one line."""


class ReportedError(Exception):
    """A failure that the command has described in its output."""


class UsageError(Exception):
    """An invalid command line that argparse cannot detect."""


# argparse repeats values in its messages. A value might be a secret in the wrong place.
_CHANGED_MESSAGES: Final = (
    (r"argument COMMAND --help: invalid choice: .*", "unknown command"),
    (r"unrecognized arguments: (--[a-z-]+).*", r"unrecognized option \1"),
    (r"unrecognized arguments: .*", "unrecognized arguments"),
    (r"invalid choice: .*\(", "invalid choice ("),
    (r"invalid \w+ value: .*", "invalid value"),
    (r"ambiguous option: ([^= ]*).* could match", r"ambiguous option: \1 could match"),
    (r"ignored explicit argument .*", "takes no value"),
    (r"required: COMMAND --help", "required: COMMAND"),
)


class Parser(argparse.ArgumentParser):
    """
    An argument parser that reports an error in one line, without the values.

    A command accepts options between its positional arguments, as in ``pub chat/ --ttl 60 hello``.
    """

    _retries_intermixed = False

    def parse_known_args(  # type: ignore[override]  # argparse's is generic in the namespace
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        into = namespace or argparse.Namespace()
        parsed, rest = super().parse_known_args(args, into)
        if rest and self._retries_intermixed:
            self._retries_intermixed = False  # Python 3.11's implementation calls this method
            parsed, rest = self.parse_known_intermixed_args(args, into)
            if rest:
                self.error(f"unrecognized arguments: {' '.join(rest)}")
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage before the message.
        if message.endswith("expected one argument"):
            message += "; if its value begins with '-', write --option=VALUE"
        for pattern, replacement in _CHANGED_MESSAGES:
            message = re.sub(pattern, replacement, message, flags=re.DOTALL)
        self.exit(2, f"{NAME}: {message} (see {self.prog} --help)\n")

    def set_command(
        self, run: Run, *, arguments: str = "", description: str, examples: str
    ) -> None:
        """
        Set what a command does and the texts of its help, and add the options of all commands.

        :param run: the function that runs the command
        :param arguments: the positional arguments, as the usage shows them
        :param examples: command lines, in which ``%(prog)s`` is the program with the command
        """
        self.usage = f"%(prog)s [options] {arguments}".rstrip()
        self.description = description
        self.epilog = f"examples:\n{examples}"
        self.add_argument(
            "--backend",
            choices=["asyncio", "trio"],
            default="asyncio",
            metavar="NAME",
            help="asyncio or trio (default: %(default)s)",
        )
        self.set_defaults(run=run, parser=self)
        self._retries_intermixed = True


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A formatter that leaves enough space for the names of options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_HELP_COLUMN)


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
    """Parse a URL that ``connect()`` accepts, or a host with a port, and return the URL."""
    if _HOST_AND_PORT.fullmatch(text):
        text = f"mqtt://{text}"
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


def duration(text: str) -> float:
    """Parse a duration, and return seconds."""
    if found := _DURATION.fullmatch(text):
        return float(found[1]) * _UNIT_SECONDS[found[2]]
    raise argparse.ArgumentTypeError("expected a number of seconds, or a duration such as 10m")


def period(text: str) -> float:
    """Parse a duration greater than 0, and return seconds."""
    if (seconds := duration(text)) == 0:
        raise argparse.ArgumentTypeError("expected more than 0 seconds")
    return seconds


def ttl(text: str) -> int:
    """Parse how long a message or a key is valid, and return seconds."""
    seconds = duration(text)
    if seconds.is_integer():
        return count(str(int(seconds)))
    raise argparse.ArgumentTypeError("expected a whole number of seconds, or a duration such as 1h")


def moment(text: str) -> float:
    """Parse a time: an age, Unix seconds, or a date with or without a time."""
    try:
        if text.isdigit():
            seconds = float(text)
        elif _DURATION.fullmatch(text):
            seconds = time.time() - duration(text)
        else:
            seconds = datetime.fromisoformat(text).timestamp()
        unix_seconds("the time", seconds)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            "expected a time from 2018 to 2066, such as 10m (s, m, h or d ago), "
            "2030-01-31T12:00 or Unix seconds"
        ) from None
    return seconds
