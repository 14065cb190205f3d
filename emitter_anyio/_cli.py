"""
The command line: ``emitter-anyio``, and ``python -m emitter_anyio``.

A command is one coroutine function and the ``_add_…`` function before it, which says how it is
called; :data:`_COMMANDS` lists them.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias
from urllib.parse import urlsplit

import anyio

from ._client import Emitter, connect
from ._errors import ConnectError, EmitterError
from ._messages import EmitterMessage
from ._presence import PresenceFeed
from ._version import __version__

if TYPE_CHECKING:
    from .testing import Broker

    _Subparsers: TypeAlias = "argparse._SubParsersAction[_Parser]"

_SCRIPT: Final = "emitter-anyio"
_DEMO_PORT: Final = 8080
_BROKEN_PIPE: Final = 128 + 13
_INTERRUPTED: Final = 128 + signal.SIGINT


class _Failure(Exception):
    """What has gone wrong, in one line for the user."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line: the usage that argparse puts before it is in --help.
        self.exit(2, f"{_SCRIPT}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    :param argv: its name and arguments; those of the process if not given
    :return: the exit code: 0, or 1 if the command failed
    :raises SystemExit: with code 2 for a command line that is wrong, and 0 behind ``--help``
    """
    arguments = _make_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], Awaitable[None]] = arguments.run
    try:
        anyio.run(run, arguments, backend=arguments.backend)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Who read our output has left. Python flushes once more at exit, and must find a file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except (EmitterError, _Failure) as exc:
        print(f"{_SCRIPT}: {exc}", file=sys.stderr)
        return 1
    return 0


def _make_parser() -> _Parser:
    module = Path(sys.argv[0]).name == "__main__.py"
    parser = _Parser(
        prog="python -m emitter_anyio" if module else _SCRIPT,
        description="Emitter (https://emitter.io) from the command line.",
        epilog="Start with:  %(prog)s demo",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{_SCRIPT} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    return parser


def _add_command(
    commands: _Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], Awaitable[None]],
    summary: str,
    *,
    more: str,
    examples: Sequence[str],
) -> _Parser:
    shown = "".join(f"\n  %(prog)s {example}".rstrip() for example in examples)
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {more}",
        epilog=f"examples:{shown}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--backend",
        choices=["asyncio", "trio"],
        default="asyncio",
        help="the event loop to run on (default: %(default)s)",
    )
    parser.set_defaults(run=run)
    return parser


def _url(text: str) -> str:
    try:
        connect(text)
    except (TypeError, ValueError) as exc:
        # argparse would show the URL, which may carry a password.
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


def _say(what: str, text: str) -> None:
    print(f"{what:<11} {text}", flush=True)


# demo


def _add_demo(commands: _Subparsers) -> None:
    parser = _add_command(
        commands,
        "demo",
        _demo,
        "publish, receive and see who is there, in a few seconds",
        more="Without --url\nit starts a development broker of its own and needs nothing else.",
        examples=[
            "",
            "--backend trio",
            "--url mqtt://127.0.0.1:8080 --secret SECRET",
        ],
    )
    parser.add_argument("--url", type=_url, help="a broker that is running, mqtt:// or mqtts://")
    parser.add_argument(
        "--secret",
        help="its secret key, to make a key with; everybody on this machine can see a command "
        "line, so EMITTER_SECRET in the environment is the better place",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=30,
        metavar="SECONDS",
        help="give up after this long (default: %(default)s)",
    )
    parser.set_defaults(error=parser.error)


async def _demo(arguments: argparse.Namespace) -> None:
    # What goes wrong here is raised, and told in one line: no log beside it.
    logging.getLogger("emitter_anyio").addHandler(logging.NullHandler())
    if arguments.secret is not None and arguments.url is None:
        arguments.error("--secret belongs to the broker of --url: give both")
    secret = arguments.secret or os.environ.get("EMITTER_SECRET")
    if arguments.url is not None and not secret:
        arguments.error("--url needs that broker's --secret, or EMITTER_SECRET in the environment")
    with anyio.move_on_after(arguments.timeout):
        async with AsyncExitStack() as stack:
            url = arguments.url
            if url is None:
                from .testing import Broker

                broker = await stack.enter_async_context(Broker())
                url, secret = broker.url, broker.secret_key
                _say("broker", f"a development broker listens on {url}")
            await _tell_story(url, secret)
        return
    raise _Failure(
        f"the demo was not done within {arguments.timeout:g} s: the broker does not deliver, or "
        "does not store, or is slow (--timeout)"
    )
