"""The broker, the keys and the client of a command, from options, a file and the environment."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import ssl
import sys
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from getpass import getpass
from pathlib import Path
from typing import Any, Final, Literal

from emitter_anyio import Backoff, Emitter, RequestError, connect
from emitter_anyio._values.channels import KeySource, check_key

from ._arguments import DEFAULT_URL, CommandError, UsageError, url, username
from ._output import is_terminal, note

_NAMES: Final = {"url": "EMITTER_URL", "key": "EMITTER_KEY", "secret": "EMITTER_SECRET"}

SECRET_HELP: Final = "secret key to generate a key with"
"""The help of ``--secret`` in commands that need a channel key."""

_GENERATED_KEY_SECONDS: Final = 86400
"""The lifetime of a channel key that a command generates for itself."""


def add_source(
    parser: argparse.ArgumentParser,
    *,
    url_help: str = f"broker (EMITTER_URL, else {DEFAULT_URL})",
    key: str = "",
    secret: str = "",
) -> None:
    """
    Add the options for the broker and the keys.

    :param url_help: the help of ``--url``
    :param key: the help of ``--key``, or ``""`` for commands without it
    :param secret: the help of ``--secret``, or ``""`` for commands without it
    """
    group = parser.add_argument_group(
        "broker and keys",
        "Options take precedence over the file of --env-file, and that file over the\n"
        "environment variables in parentheses. Other users of this machine can see keys\n"
        "and passwords in a command line, but not in the file or the environment.\n"
        "URL begins with mqtt://, mqtts://, ws:// or wss://, or is HOST:PORT (mqtt://).",
    )
    group.add_argument("-u", "--url", type=url, help=url_help)
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
    group.add_argument(
        "--password-file", metavar="FILE", help="file with the password of the user name"
    )
    group.add_argument("--cafile", metavar="FILE", help="PEM file with the authorities to trust")
    group.add_argument(
        "--client-cert", metavar="FILE", help="PEM file with the client's certificate"
    )
    group.add_argument(
        "--client-key", metavar="FILE", help="PEM file with its key (default: --client-cert)"
    )
    parser.set_defaults(find_source=find_source)


@dataclass(frozen=True, slots=True, repr=False)
class Source:
    """
    The broker and the keys of a command.

    :ivar url: the URL of the broker
    :ivar key: the channel key, if any
    :ivar secret: the secret key, if any
    :ivar origins: the option, file or variable that contained each of these
    :ivar options: further options of ``connect()``
    """

    url: str
    key: str | None
    secret: str | None
    origins: Mapping[str, str]
    options: Mapping[str, Any]

    @property
    def context(self) -> ssl.SSLContext | None:
        """The TLS context, or ``None`` to trust the system's authorities."""
        context: ssl.SSLContext | None = self.options.get("ssl_context")
        return context

    def describe_key(self, refused: RequestError) -> str:
        """Describe where the key that the broker refused comes from, or return ``""``."""
        name = "secret" if refused.operation in ("keygen", "keyban") else "key"
        if self.origins.get("key") == "--key":
            # Only the command keygen then requests a key, with this one as an extend key.
            name = "key"
        origin = self.origins.get(name)
        return f"the {name.replace('secret', 'secret key')} is from {origin}" if origin else ""

    def key_for(self, emitter: Emitter, permissions: str, channel: str) -> KeySource:
        """
        Return the channel key, or a function that generates one with the secret key.

        :raises UsageError: if both are missing, or the one to use is malformed
        """
        if self.key:
            return self._checked("key")
        if not self.secret:
            raise UsageError(
                "missing key: use --key or EMITTER_KEY, or --secret or EMITTER_SECRET to generate "
                "one for this command"
            )
        secret = self._checked("secret")

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
        return self._checked("secret")

    def _checked(self, name: Literal["key", "secret"]) -> str:
        try:
            return check_key(getattr(self, name))
        except ValueError as exc:
            raise UsageError(f"{self.origins[name]}: {exc}") from None


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
    found = {"url": DEFAULT_URL}
    origins = {"url": "the default"}
    for option, name in _NAMES.items():
        places = {
            f"--{option}": getattr(arguments, option, None),
            arguments.env_file: file.get(name),
            name: os.environ.get(name),
        }
        for place, value in places.items():
            if value:
                found[option], origins[option] = value, place
                break
    try:
        broker = url(found["url"])
    except argparse.ArgumentTypeError as exc:
        raise UsageError(f"{origins['url']}: {exc}") from None
    options = {
        "username": arguments.username,
        "password": _read_password(arguments.password_file),
        "ssl_context": _tls_context(arguments, broker),
    }
    options = {name: value for name, value in options.items() if value is not None}
    try:
        connect(broker, **options)
    except (TypeError, ValueError) as exc:
        raise UsageError(str(exc)) from None
    return Source(broker, found.get("key"), found.get("secret"), origins, options)


def _read_text(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise CommandError(
            f"cannot read {name}: {getattr(exc, 'strerror', None) or 'it is not UTF-8'}"
        ) from exc


def _read_password(name: str | None) -> str | None:
    if name is None:
        return None
    lines = _read_text(name).splitlines()
    if len(lines) != 1:
        raise CommandError(f"cannot read {name}: expected one line, the password")
    return lines[0]


def _read_variables(name: str) -> dict[str, str]:
    found = {}
    for number, line in enumerate(_read_text(name).splitlines(), 1):
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


def _tls_context(arguments: argparse.Namespace, broker: str) -> ssl.SSLContext | None:
    authorities: str | None = arguments.cafile
    certificate: str | None = arguments.client_cert
    key: str | None = arguments.client_key
    if key is not None and certificate is None:
        raise UsageError("--client-key requires --client-cert")
    if authorities is None and certificate is None:
        return None
    if not broker.startswith(("mqtts:", "wss:")):
        option = "--client-cert" if authorities is None else "--cafile"
        raise UsageError(f"{option} requires TLS: use an mqtts:// or wss:// URL")
    try:
        context = ssl.create_default_context(cafile=authorities)
    except OSError as exc:
        raise CommandError(
            f"cannot load {authorities}: {exc.strerror or exc}; expected certificates in PEM format"
        ) from exc
    if certificate is not None:
        files = certificate if key is None else f"{certificate} and {key}"
        try:
            context.load_cert_chain(certificate, key, partial(_ask_passphrase, key or certificate))
        except OSError as exc:
            raise CommandError(
                f"cannot load {files}: {exc.strerror or exc}; expected a certificate and its key "
                "in PEM format"
            ) from exc
    return context


def _ask_passphrase(name: str) -> str:
    if not is_terminal(sys.stdin):
        raise CommandError(
            f"cannot load {name}: the key is encrypted, and standard input is not a terminal to "
            "enter its passphrase"
        )
    return getpass(f"passphrase of {name}: ")


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
