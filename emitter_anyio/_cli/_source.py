"""Where the broker is and which keys open it: flags, a file, the environment; and the client."""

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

TO_MAKE_A_KEY: Final = "the broker's secret, to make a key with if none is given"
"""What the secret is for in most commands."""

_A_DAY: Final = 86400


def add_source(parser: argparse.ArgumentParser, *, key: str = "", secret: str = "") -> None:
    """
    Add the options that say where the broker is, and what opens it.

    :param key: what a key is for here, if there is one
    :param secret: what the secret is for here, if it may be given
    """
    group = parser.add_argument_group(
        "broker and keys",
        "Each comes from its option, or else from --env-file, or else from the environment. "
        "Other users of\nthis machine can see a command line (ps), and so a key or a password in "
        "it, but neither that file\nnor the environment.",
    )
    group.add_argument(
        "-u",
        "--url",
        type=url,
        help="where the broker is: mqtt://HOST:PORT, mqtts://, ws:// or wss:// "
        f"(EMITTER_URL; default: {DEFAULT_URL})",
    )
    if key:
        group.add_argument("-k", "--key", help=f"{key} (EMITTER_KEY)")
    if secret:
        group.add_argument("--secret", help=f"{secret} (EMITTER_SECRET)")
    group.add_argument(
        "--env-file",
        metavar="FILE",
        help="take them from lines such as EMITTER_KEY=..., as a shell reads them",
    )
    group.add_argument(
        "--username", type=username, metavar="NAME", help="the name that presence shows of us"
    )
    group.add_argument(
        "--cafile",
        metavar="FILE",
        help="trust the authorities in this PEM file, instead of the system's",
    )


@dataclass(frozen=True, slots=True, repr=False)
class Source:
    """
    What was found.

    :ivar url: where the broker is
    :ivar origin: who said so
    :ivar key: the key, if any
    :ivar secret: the secret, if any
    :ivar username: what presence shows, if anything
    :ivar context: whom TLS trusts, unless the system's authorities
    """

    url: str
    origin: str
    key: str | None
    secret: str | None
    username: str | None
    context: ssl.SSLContext | None

    @property
    def options(self) -> dict[str, Any]:
        """What ``connect()`` is to be told beside the URL."""
        found = {"username": self.username, "ssl_context": self.context}
        return {name: value for name, value in found.items() if value is not None}

    def key_for(self, emitter: Emitter, permissions: str, channel: str) -> Key:
        """
        Give the key, or else what makes one with the secret.

        :raises UsageError: if there is neither, or it cannot be a key
        """
        if self.key:
            return _checked(self.key)
        if not self.secret:
            raise UsageError(
                "a key is needed: --key or EMITTER_KEY; or --secret or EMITTER_SECRET, and one is "
                "made for this command"
            )
        secret = _checked(self.secret)

        async def make() -> str:
            made = await emitter.keygen(secret, _coverable(channel), permissions, ttl=_A_DAY)
            return made.key

        return make

    def needed_secret(self) -> str:
        """
        Give the secret.

        :raises UsageError: if there is none, or it cannot be a key
        """
        if not self.secret:
            raise UsageError("the broker's secret is needed: --secret or EMITTER_SECRET")
        return _checked(self.secret)


def _checked(key: str) -> str:
    try:
        return check_key(key)
    except ValueError as exc:
        raise UsageError(str(exc)) from None


def _coverable(channel: str) -> str:
    """Give a target for a key that covers a channel: one that ends in ``+/`` opens nothing."""
    bare = channel
    while bare.endswith(("+/", "#/")):
        bare = bare[:-2]
    return channel if bare == channel else f"{bare}#/"


def find_source(arguments: argparse.Namespace) -> Source:
    """
    Look in flags, file and environment, in this order.

    :raises UsageError: if one of them is wrong
    :raises CommandError: if a file cannot be read
    """
    file = {} if arguments.env_file is None else _read(arguments.env_file)
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
    context = None if arguments.cafile is None else _trusting(arguments.cafile, broker)
    return Source(
        broker, origin, found.get("key"), found.get("secret"), arguments.username, context
    )


def _read(name: str) -> dict[str, str]:
    try:
        lines = Path(name).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise CommandError(
            f"cannot read {name}: {getattr(exc, 'strerror', None) or 'it is no UTF-8'}"
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
            # What is there may be half a secret.
            raise CommandError(f"{name}, line {number} is not NAME=VALUE")
        found[variable.strip()] = "".join(words)
    return found


def _trusting(name: str, broker: str) -> ssl.SSLContext:
    if not broker.startswith(("mqtts:", "wss:")):
        raise UsageError("--cafile is for TLS: mqtts:// or wss://")
    try:
        return ssl.create_default_context(cafile=name)
    except OSError as exc:
        raise CommandError(
            f"cannot trust {name}: {exc.strerror or exc} (certificates in PEM form)"
        ) from exc


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextmanager
def _logging(handler: logging.Handler) -> Iterator[None]:
    logger = logging.getLogger("emitter_anyio")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@asynccontextmanager
async def lasting(source: Source, **options: Any) -> AsyncGenerator[Emitter]:
    """Connect for as long as it takes: a lost link comes back, and stderr tells of it."""
    emitter = connect(source.url, reconnect=Backoff(), **source.options, **options)
    connected = False

    @emitter.on("connect")
    def tell() -> None:
        nonlocal connected
        if connected and emitter.connection is not None:
            note(f"connected again to {emitter.connection.server}")
        connected = True

    # What still comes while we leave is no news.
    with _logging(logging.NullHandler()):
        async with emitter:
            with _logging(_Notes(logging.WARNING)):
                yield emitter


@asynccontextmanager
async def asking(source: Source, **options: Any) -> AsyncGenerator[Emitter]:
    """Connect once, for an answer; what goes wrong is raised."""
    # It is told in one line: no second one from the log.
    with _logging(logging.NullHandler()):
        async with connect(source.url, reconnect=None, **source.options, **options) as emitter:
            yield emitter
