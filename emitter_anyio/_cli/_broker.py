"""The commands ``broker`` and ``license``."""

from __future__ import annotations

import argparse
import errno
import ssl
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, get_args

import anyio

from emitter_anyio._values.router import Matcher

from . import _arguments as arguments_
from ._arguments import CommandError, Parser, UsageError
from ._output import hint, print_line

if TYPE_CHECKING:
    from emitter_anyio.testing import Broker


def add_broker(parser: Parser) -> None:
    """Add the arguments of ``broker``."""
    parser.set_command(
        _broker,
        description=(
            "Run a development broker until Ctrl-C.\n\n"
            "It behaves like Emitter and accepts Emitter's keys, but stores messages in\n"
            "memory only. Do not use it in production."
        ),
        examples=(
            "  %(prog)s\n"
            "  %(prog)s --port 0    # print the chosen free port\n\n"
            "  # accept the keys of an earlier run\n"
            "  %(prog)s --license LICENSE\n\n"
            "  %(prog)s --tls-cert cert.pem --tls-key key.pem"
        ),
    )
    parser.set_defaults(ends_by_signal=True)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=arguments_.port,
        default=8080,
        help="port, or 0 for a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--license", type=_license, help="Emitter licence (default: generate a new one)"
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="PEM file with the TLS certificates")
    parser.add_argument(
        "--tls-key", metavar="FILE", help="PEM file with their key (default: --tls-cert)"
    )
    parser.add_argument(
        "--matcher",
        choices=get_args(Matcher),
        default="emitter",
        metavar="NAME",
        help="emitter or mqtt (default: %(default)s)",
    )


def _license(text: str) -> str:
    from emitter_anyio.testing import Broker

    try:
        Broker(license=text)
    except ValueError as exc:
        # argparse's own message would show the licence.
        raise argparse.ArgumentTypeError(str(exc)) from None
    return text


async def _broker(arguments: argparse.Namespace) -> None:
    from emitter_anyio.testing import Broker

    broker = Broker(
        arguments.host,
        arguments.port,
        license=arguments.license,
        ssl_context=_ssl_context(arguments.tls_cert, arguments.tls_key),
        matcher=arguments.matcher,
    )
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(broker)
        except OSError as exc:
            advice = "; use --port 0 for a free port" if exc.errno == errno.EADDRINUSE else ""
            raise CommandError(
                f"cannot listen on {arguments.host} port {arguments.port}: "
                f"{exc.strerror or exc}{advice}"
            ) from exc
        print_line(f"listening on {broker.url}")
        _print_license(broker, secret=arguments.license is None)
        hint(
            f"in other terminals: export EMITTER_URL={broker.url} EMITTER_SECRET=...; press Ctrl-C "
            "here to stop"
        )
        await anyio.sleep_forever()


def _print_license(broker: Broker, *, secret: bool) -> None:
    print_line(f"license {broker.license}")
    if secret:
        print_line(f"secret key {broker.secret_key}")


def _ssl_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    if certificate is None:
        if key is not None:
            raise UsageError("--tls-key requires --tls-cert")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as exc:
        files = certificate if key is None else f"{certificate} and {key}"
        raise CommandError(
            f"cannot load {files}: {exc.strerror or exc}; expected a certificate and its key in "
            "PEM format"
        ) from exc
    return context


def add_license(parser: Parser) -> None:
    """Add the arguments of ``license``."""
    parser.set_command(
        _license_command,
        description=(
            "Generate a licence for a development or production broker, and its secret key.\n\n"
            "Channel keys are generated with the secret key."
        ),
        examples="  %(prog)s",
    )


async def _license_command(arguments: argparse.Namespace) -> None:
    from emitter_anyio.testing import Broker

    _print_license(Broker(), secret=True)
