"""The broker, the keys and the client of a command, from options, a file and the environment."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import ssl
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from emitter_anyio import Backoff, Emitter, connect
from emitter_anyio._values.channels import Key, check_key

from ._arguments import CommandError, UsageError, url, username
from ._output import note

DEFAULT_URL: Final = "mqtt://127.0.0.1:8080"

_NAMES: Final = {"url": "EMITTER_URL", "key": "EMITTER_KEY", "secret": "EMITTER_SECRET"}

SECRET_HELP: Final = "secret key to generate a key with"
"""The help of ``--secret`` in commands that need a channel key."""

_GENERATED_KEY_SECONDS: Final = 86400
"""The lifetime of a channel key that a command generates for itself."""


def add_source(parser: argparse.ArgumentParser, *, key: str = "", secret: str = "") -> None:
    """
    Add the options for the broker and the keys.

    :param key: the help of ``--key``, or ``""`` for commands without it
    :param secret: the help of ``--secret``, or ``""`` for commands without it
    """
    group = parser.add_argument_group(
        "broker and keys",
        "An option takes precedence over a line of --env-file, and that over the\n"
        "environment variable in parentheses. Other users of this machine can see keys\n"
        "and passwords in a command line, but not in the file or the environment.\n"
        "URL begins with mqtt://, mqtts://, ws:// or wss://.",
    )
    group.add_argument(
        "-u",
        "--url",
        type=url,
        help=f"broker (EMITTER_URL, else {DEFAULT_URL})",
    )
    if key:
        group.add_argument("-k", "--key", help=f"{key} (EMITTER_KEY)")
    if secret:
        group.add_argument("--secret", help=f"{secret} (EMITTER_SECRET)")
    group.add_argument(
        "--env-file",
        metavar="FILE",
        help="file with lines such as EMITTER_KEY=...",
    )
    group.add_argument(
        "--username", type=username, metavar="NAME", help="user name to show in presence"
    )
    group.add_argument("--cafile", metavar="FILE", help="PEM file with the authorities to trust")


@dataclass(frozen=True, slots=True, repr=False)
class Source:
    """
    The broker and the keys of a command.

    :ivar url: the URL of the broker
    :ivar origin: the option, file or variable that contained the URL
    :ivar key: the channel key, if any
    :ivar secret: the secret key, if any
    :ivar username: the user name shown in presence, if any
    :ivar context: the TLS context, or ``None`` to trust the system's authorities
    """

    url: str
    origin: str
    key: str | None
    secret: str | None
    username: str | None
    context: ssl.SSLContext | None

    @property
    def options(self) -> dict[str, Any]:
        """The options of ``connect()``, without the URL."""
        found = {"username": self.username, "ssl_context": self.context}
        return {name: value for name, value in found.items() if value is not None}

    def key_for(self, emitter: Emitter, permissions: str, channel: str) -> Key:
        """
        Return the channel key, or a function that generates one with the secret key.

        :raises UsageError: if both are missing, or the one to use is malformed
        """
        if self.key:
            return _checked(self.key)
        if not self.secret:
            raise UsageError(
                "missing key: use --key or EMITTER_KEY, or --secret or EMITTER_SECRET to generate "
                "one for this command"
            )
        secret = _checked(self.secret)

        async def generate() -> str:
            made = await emitter.keygen(
                secret, _key_target(channel), permissions, ttl=_GENERATED_KEY_SECONDS
            )
            return made.key

        return generate

    def needed_secret(self) -> str:
        """
        Return the secret key.

        :raises UsageError: if it is missing or malformed
        """
        if not self.secret:
            raise UsageError("missing secret key: use --secret or EMITTER_SECRET")
        return _checked(self.secret)


def _checked(key: str) -> str:
    try:
        return check_key(key)
    except ValueError as exc:
        raise UsageError(str(exc)) from None


def _key_target(channel: str) -> str:
    """Return the target of a key for a channel; no key for a target that ends in ``+/`` works."""
    bare = channel
    while bare.endswith(("+/", "#/")):
        bare = bare[:-2]
    return channel if bare == channel else f"{bare}#/"


def find_source(arguments: argparse.Namespace) -> Source:
    """
    Read the broker and the keys from options, file and environment, in this order.

    :raises UsageError: if a value is invalid
    :raises CommandError: if a file cannot be read
    """
    file = {} if arguments.env_file is None else _read_variables(arguments.env_file)
    found: dict[str, str] = {}
    origin = "the default"
    for option, name in _NAMES.items():
        places = {
            f"--{option}": getattr(arguments, option, None),
            arguments.env_file: file.get(name),
            name: os.environ.get(name),
        }
        for place, value in places.items():
            if value:
                found[option] = value
                origin = place if option == "url" else origin
                break
    broker = found.get("url", DEFAULT_URL)
    try:
        url(broker)
    except argparse.ArgumentTypeError as exc:
        raise UsageError(f"{origin}: {exc}") from None
    context = None if arguments.cafile is None else _tls_context(arguments.cafile, broker)
    return Source(
        broker, origin, found.get("key"), found.get("secret"), arguments.username, context
    )


def _read_variables(name: str) -> dict[str, str]:
    try:
        lines = Path(name).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise CommandError(
            f"cannot read {name}: {getattr(exc, 'strerror', None) or 'it is not UTF-8'}"
        ) from exc
    found = {}
    for number, line in enumerate(lines, 1):
        variable, equals, value = line.strip().removeprefix("export ").partition("=")
        if not variable or variable.startswith("#"):
            continue
        try:
            words = shlex.split(value, comments=True) if equals else None
        except ValueError:
            words = None
        if words is None or len(words) > 1:
            # The message omits the line, which might contain a secret.
            raise CommandError(f"cannot read {name}: line {number} is not NAME=VALUE")
        found[variable.strip()] = "".join(words)
    return found


def _tls_context(name: str, broker: str) -> ssl.SSLContext:
    if not broker.startswith(("mqtts:", "wss:")):
        raise UsageError("--cafile requires TLS: use an mqtts:// or wss:// URL")
    try:
        return ssl.create_default_context(cafile=name)
    except OSError as exc:
        raise CommandError(
            f"cannot load {name}: {exc.strerror or exc}; expected certificates in PEM format"
        ) from exc


class _NoteHandler(logging.Handler):
    """Prints log records to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        note(record.getMessage() if cause is None else f"{record.getMessage()}: {cause}")


@contextmanager
def _logging(handler: logging.Handler) -> Iterator[None]:
    logger = logging.getLogger("emitter_anyio")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@asynccontextmanager
async def stay_connected(source: Source, **options: Any) -> AsyncGenerator[Emitter]:
    """Connect, and reconnect after a loss, with notes on stderr."""
    emitter = connect(source.url, reconnect=Backoff(), **source.options, **options)
    connected = False

    @emitter.on("connect")
    def note_reconnection() -> None:
        nonlocal connected
        if connected and emitter.connection is not None:
            note(f"reconnected to {emitter.connection.server}")
        connected = True

    # Warnings while connecting and disconnecting would only repeat errors that are raised.
    with _logging(logging.NullHandler()):
        async with emitter:
            with _logging(_NoteHandler(logging.WARNING)):
                yield emitter


@asynccontextmanager
async def connect_once(source: Source, **options: Any) -> AsyncGenerator[Emitter]:
    """Connect, and raise if the connection is lost."""
    # The raised error is printed in one line; the log would print it again.
    with _logging(logging.NullHandler()):
        async with connect(source.url, reconnect=None, **source.options, **options) as emitter:
            yield emitter
