"""The list of commands, and the parser of the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

from emitter_anyio import __version__

from ._arguments import DEFAULT_URL, NAME, HelpFormatter, Parser

COMMANDS: Final = {
    "demo": ("_demo", "run a demonstration of a few seconds"),
    "broker": ("_broker", "run a development broker"),
    "license": ("_broker", "generate a licence and its secret key"),
    "doctor": ("_doctor", "check the connection, the broker and a key"),
    "bench": ("_bench", "measure the rate and the latency of a broker"),
    "top": ("_top", "show the load of each node of the broker"),
    "pub": ("_pub", "publish messages"),
    "sub": ("_sub", "print the messages of channels"),
    "presence": ("_presence", "show the subscribers of a channel"),
    "history": ("_history", "print stored messages"),
    "consume": ("_consume", "print every stored message, also after a restart"),
    "request": ("_request", "send a request and print the reply"),
    "serve": ("_serve", "reply to requests with the output of a program"),
    "keygen": ("_keys", "generate a channel key"),
    "ban": ("_keys", "ban a channel key"),
    "unban": ("_keys", "lift the ban on a channel key"),
    "link": ("_pub", "create a link and publish through it"),
    "me": ("_keys", "print the id of a new connection"),
    "completion": ("_completion", "print a script for completion in a shell"),
}
"""
For each command, its module and the line that describes it.

The function ``add_NAME(parser)`` of the module adds the arguments. Only the module of the command
that runs is imported.
"""


def make_parser(arguments: Sequence[str]) -> Parser:
    """
    Make a parser for a command line, in which only the command that is used has its arguments.

    :param arguments: the command line, without the name of the program
    """
    as_module = Path(sys.argv[0]).name == "__main__.py"
    # The options before a command take no value, so the first other argument is its name.
    used = [each for each in arguments if not each.startswith("-")][:1]
    return _make_parsers("python -m emitter_anyio" if as_module else NAME, used)[0]


def make_all_parsers() -> list[Parser]:
    """Make the parser of the program, followed by those of all commands."""
    return _make_parsers(NAME, [*COMMANDS])


def _make_parsers(program: str, used: Sequence[str]) -> list[Parser]:
    parser = Parser(
        prog=program,
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="A client for Emitter (https://emitter.io), and a development broker.",
        epilog=(
            "environment:\n"
            f"  EMITTER_URL     URL of the broker (default: {DEFAULT_URL})\n"
            "  EMITTER_KEY     channel key\n"
            "  EMITTER_SECRET  secret key; without a channel key, commands generate one\n\n"
            "examples:\n"
            "  %(prog)s demo\n\n"
            "  # a development broker, and in a second terminal two clients of it\n"
            "  %(prog)s broker\n"
            f"  export EMITTER_URL={DEFAULT_URL} EMITTER_SECRET=...\n"
            "  %(prog)s sub chat/ &\n"
            "  %(prog)s pub chat/ hello\n\n"
            "exit codes:\n"
            "  0 success, 1 failure, 2 invalid command line, 130 Ctrl-C, 141 closed pipe,\n"
            "  143 SIGTERM"
        ),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    # argparse makes the column of names only as wide as this line.
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND --help", prog=program, required=True
    )
    made = [parser]
    for name, (module, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help, formatter_class=HelpFormatter)
        if name in used:
            getattr(import_module(f".{module}", __package__), f"add_{name}")(command)
        made.append(command)
    return made
