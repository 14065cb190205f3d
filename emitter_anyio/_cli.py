"""
The command line: ``emitter-anyio``, and ``python -m emitter_anyio``.

A command is a coroutine function, and before it the ``_add_…`` function that says how to call it;
:data:`_COMMANDS` lists the latter.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import secrets
import signal
import ssl
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias, get_args
from urllib.parse import urlsplit

import anyio

from ._client import Emitter, connect
from ._errors import ConnectError, EmitterError
from ._messages import EmitterMessage
from ._options import make_options
from ._requests import PresenceEvent
from ._router import Matcher
from ._version import __version__

if TYPE_CHECKING:
    from .testing import Broker

_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"
_Run: TypeAlias = Callable[[argparse.Namespace], Coroutine[Any, Any, None]]

_NAME: Final = "emitter-anyio"

_VERBS: Final = {"status": "is here", "subscribe": "has come", "unsubscribe": "has left"}

# What a shell reports of a process that such a signal has ended; Windows knows no SIGPIPE.
_INTERRUPTED: Final = 128 + signal.SIGINT
_BROKEN_PIPE: Final = 128 + 13


class _CommandError(Exception):
    """Why a command failed, in one line."""


class _UsageError(Exception):
    """What is wrong with a command line, where argparse cannot tell."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would put the usage before it, several lines long.
        if message.endswith("expected one argument"):
            message += "; if its value begins with '-', write --option=VALUE"
        # What it repeats may be a URL in a wrong place, with a password.
        message = re.sub(r"://\S*@", "://…@", message)
        self.exit(2, f"{_NAME}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    :param argv: its name and arguments; the process's own unless given
    :return: the exit code: 0, 1 if the command failed, or what a shell reports of a process that
        was interrupted, or whose reader has left
    :raises SystemExit: with 2 if the command line is wrong, with 0 behind ``--help``
    """
    arguments = _make_parser().parse_args(argv)
    try:
        anyio.run(arguments.run, arguments, backend=arguments.backend)
    except _UsageError as exc:
        arguments.parser.error(str(exc))
    except (EmitterError, _CommandError) as exc:
        print(f"{_NAME}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # That is how the broker is told to end, where or while nothing waits for the signal.
        return 0 if arguments.run is _broker else _INTERRUPTED
    except BrokenPipeError:
        # Python flushes once more at exit, and must not fail then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    return 0


def _make_parser() -> _Parser:
    as_module = Path(sys.argv[0]).name == "__main__.py"
    parser = _Parser(
        prog="python -m emitter_anyio" if as_module else _NAME,
        description="A client of Emitter (https://emitter.io), and a broker to develop against.",
        epilog="start with:\n  %(prog)s demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{_NAME} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    return parser


def _add_command(
    commands: _Commands, name: str, run: _Run, *, help: str, description: str, examples: str
) -> _Parser:
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


def _url(text: str) -> str:
    try:
        make_options(text, {})
    except (TypeError, ValueError) as exc:
        # argparse's own message would show the URL, which may carry a password.
        raise argparse.ArgumentTypeError(str(exc)) from None
    return text


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port from 0 to 65535")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if seconds >= 0:
        return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")


def _license(text: str) -> str:
    from .testing import Broker

    try:
        Broker(license=text)
    except ValueError as exc:
        # argparse's own message would show the licence.
        raise argparse.ArgumentTypeError(str(exc)) from None
    return text


def _say(text: str) -> None:
    # Who reads us through a pipe wants each line when it happens.
    print(text, flush=True)


def _add_demo(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "demo",
        _demo,
        help="see a client at work, in a few seconds",
        description=(
            "Make a key, publish, receive, and watch who comes and goes: a line for each thing "
            "that\nhappens. Without --url a development broker is started for it."
        ),
        examples=(
            "  %(prog)s\n"
            "  %(prog)s --backend trio\n"
            "  EMITTER_SECRET=... %(prog)s --url mqtt://127.0.0.1:8080"
        ),
    )
    parser.add_argument(
        "--url", type=_url, help="a broker that is running, such as mqtt://HOST:PORT or wss://HOST"
    )
    parser.add_argument(
        "--secret",
        help="the secret key of its licence (default: EMITTER_SECRET in the environment; other "
        "users of this machine can see a command line)",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=30,
        metavar="SECONDS",
        help="give up after that (default: %(default)s)",
    )


async def _demo(arguments: argparse.Namespace) -> None:
    url: str | None = arguments.url
    secret: str = arguments.secret or os.environ.get("EMITTER_SECRET", "")
    if url is None and arguments.secret is not None:
        raise _UsageError("--secret belongs to the broker of --url: give both or none")
    if url is not None and not secret:
        raise _UsageError("--url needs --secret, or EMITTER_SECRET in the environment")
    # What goes wrong is raised, and told in one line: no second one from the log.
    logging.getLogger("emitter_anyio").addHandler(logging.NullHandler())
    with anyio.move_on_after(arguments.timeout):
        async with AsyncExitStack() as stack:
            if url is None:
                from .testing import Broker

                broker = await stack.enter_async_context(Broker())
                url, secret = broker.url, broker.secret_key
                _tell("broker", f"a development broker listens on {url}")
            try:
                await _story(url, secret)
            except ConnectError as exc:
                raise _CommandError(
                    f"{exc}; without --url the demo starts a broker of its own"
                ) from exc
        return
    raise _CommandError(
        f"the demo is not done after {arguments.timeout:g} s: the broker is slow, or does not "
        "store or deliver; --timeout gives it longer"
    )


def _tell(what: str, text: str) -> None:
    _say(f"{what:<12}{text}")


async def _story(url: str, secret: str) -> None:
    # Nobody else uses this channel, whatever broker it is.
    channel = f"demo/{secrets.token_hex(3)}/"
    async with _named(url, "alice") as alice:
        _tell("connect", "alice has a link to the broker")
        key = (await alice.keygen(secret, channel, "rwslp")).key
        _tell("keygen", f"a key for {channel}: read, write, store, load, presence")
        for text in ("the kettle is on", "tea is ready"):
            await alice.publish(key, channel, text, ttl=60, qos=1)
            _tell("publish", f"{text!r}, kept for 60 s: nobody listens yet")
        async with alice.subscribe(key, channel, last=2) as messages:
            _tell("subscribe", "alice listens from now on, and wants the last 2 that were kept")
            for _ in range(2):
                _tell("message", f"{_shown(await messages.receive())}, replayed")
            await alice.publish(key, channel, {"cups": 1}, qos=1)
            _tell("publish", "an object, as JSON; the broker has accepted it (qos=1)")
            _tell("message", f"{_shown(await messages.receive())}, live")
            async with alice.watch_presence(key, channel) as presence:
                _tell("presence", _happened(await presence.receive()))
                async with _named(url, "bob") as bob, bob.subscribe(key, channel, last=0):
                    _tell("presence", _happened(await presence.receive()))
                    await bob.publish(key, channel, "one for me, please", echo=False)
                    _tell("message", f"{_shown(await messages.receive())}, from bob")
                _tell("presence", _happened(await presence.receive()))
        seconds = await alice.flush()
        _tell("flush", f"the broker has taken everything; there and back in {seconds * 1e3:.1f} ms")
    _tell("disconnect", "alice has left; the README shows how to write all this")


def _named(url: str, name: str) -> Emitter:
    # Presence shows the user name; one in the URL goes first.
    options = {} if urlsplit(url).username else {"username": name}
    # One that fails is to be told of, and not to be waited for.
    return connect(url, reconnect=None, **options)


def _shown(message: EmitterMessage) -> str:
    return f"{message.as_string()!r} on {message.channel}"


def _happened(event: PresenceEvent) -> str:
    who = ", ".join(member.username or member.id for member in event.who)
    return f"{who} {_VERBS[event.event]}"


def _add_broker(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "broker",
        _broker,
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
        type=_port,
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


async def _broker(arguments: argparse.Namespace) -> None:
    from .testing import Broker

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
            raise _CommandError(
                f"cannot listen on {arguments.host} port {arguments.port}: {exc.strerror or exc} "
                "(--port 0 takes a free port)"
            ) from exc
        _say(f"listening on {broker.url}")
        _tell_license(broker, secret=arguments.license is None)
        await stop()


def _tell_license(broker: Broker, *, secret: bool) -> None:
    _say(f"license {broker.license}")
    if secret:
        _say(f"secret key {broker.secret_key}")


def _ssl_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    if certificate is None:
        if key is not None:
            raise _UsageError("--tls-key needs --tls-cert")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as exc:
        files = certificate if key is None else f"{certificate} and {key}"
        raise _CommandError(
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


def _add_license(commands: _Commands) -> None:
    _add_command(
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
    from .testing import Broker

    _tell_license(Broker(), secret=True)


_COMMANDS: Final = (_add_demo, _add_broker, _add_license)
