"""``broker`` and ``license``: the development broker."""

from __future__ import annotations

import argparse
import signal
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, get_args

import anyio

from emitter_anyio._values.router import Matcher

from . import _arguments as arguments_
from ._arguments import CommandError, Commands, UsageError, add_command
from ._output import hint, say

if TYPE_CHECKING:
    from emitter_anyio.testing import Broker


def add_broker(commands: Commands) -> None:
    """Add ``broker``."""
    parser = add_command(
        commands,
        "broker",
        run_broker,
        help="run a development broker",
        description=(
            "Run a development broker until Ctrl-C. It has Emitter's semantics and keys, keeps "
            "everything in\nmemory, and is not for production."
        ),
        examples=(
            "  %(prog)s\n"
            "  %(prog)s --port 0              # a free one, which the first line tells\n"
            "  %(prog)s --license LICENSE     # keys stay good from one run to the next\n"
            "  %(prog)s --tls-cert cert.pem --tls-key key.pem"
        ),
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=arguments_.port,
        default=8080,
        help="the port, 0 for a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--license",
        type=_license,
        help="a licence of Emitter, as a broker prints it (default: a new one, with a secret key)",
    )
    parser.add_argument(
        "--tls-cert", metavar="FILE", help="serve TLS with this certificate chain, in PEM form"
    )
    parser.add_argument(
        "--tls-key",
        metavar="FILE",
        help="the private key of --tls-cert (default: the one in its file)",
    )
    parser.add_argument(
        "--matcher",
        choices=get_args(Matcher),
        default="emitter",
        help="how channels reach subscribers (default: %(default)s)",
    )


def _license(text: str) -> str:
    from emitter_anyio.testing import Broker

    try:
        Broker(license=text)
    except ValueError as exc:
        # argparse's own message would show the licence.
        raise argparse.ArgumentTypeError(str(exc)) from None
    return text


async def run_broker(arguments: argparse.Namespace) -> None:
    """Run a development broker."""
    from emitter_anyio.testing import Broker

    broker = Broker(
        arguments.host,
        arguments.port,
        license=arguments.license,
        ssl_context=_ssl_context(arguments.tls_cert, arguments.tls_key),
        matcher=arguments.matcher,
    )
    async with AsyncExitStack() as stack:
        # Before the first line is out, so that whoever has read it can end us cleanly.
        stop = stack.enter_context(_stop_signals())
        try:
            await stack.enter_async_context(broker)
        except OSError as exc:
            raise CommandError(
                f"cannot listen on {arguments.host} port {arguments.port}: {exc.strerror or exc} "
                "(--port 0 takes a free port)"
            ) from exc
        say(f"listening on {broker.url}")
        _tell_license(broker, secret=arguments.license is None)
        hint(
            f"for other terminals: export EMITTER_URL={broker.url} EMITTER_SECRET=...; Ctrl-C ends"
        )
        await stop()


def _tell_license(broker: Broker, *, secret: bool) -> None:
    say(f"license {broker.license}")
    if secret:
        say(f"secret key {broker.secret_key}")


def _ssl_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    if certificate is None:
        if key is not None:
            raise UsageError("--tls-key needs --tls-cert")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as exc:
        files = certificate if key is None else f"{certificate} and {key}"
        raise CommandError(
            f"cannot serve TLS with {files}: {exc.strerror or exc} (a certificate and its key, in "
            "PEM form)"
        ) from exc
    return context


@contextmanager
def _stop_signals() -> Iterator[Callable[[], Awaitable[object]]]:
    """Give what waits for a signal that says to stop."""
    if sys.platform == "win32":  # pragma: no cover - there Ctrl-C comes as KeyboardInterrupt only
        yield anyio.sleep_forever
    else:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            yield signals.__anext__


def add_license(commands: Commands) -> None:
    """Add ``license``."""
    add_command(
        commands,
        "license",
        _make_license,
        help="make a licence and its secret key",
        description=(
            "Make a licence, for a development broker or a real one, and a secret key, with which "
            "keys are\nmade. A line each, as the broker prints them."
        ),
        examples="  %(prog)s",
    )


async def _make_license(arguments: argparse.Namespace) -> None:
    from emitter_anyio.testing import Broker

    _tell_license(Broker(), secret=True)
