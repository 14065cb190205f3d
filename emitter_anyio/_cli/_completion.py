"""The command ``completion``."""

from __future__ import annotations

import argparse
from typing import Final

from anyio import to_thread

from ._arguments import NAME, CommandError, Parser
from ._commands import make_all_parsers
from ._output import print_line

_SHELLS: Final = ("bash", "zsh", "fish")

_NO_CHOICES: Final = {"zsh": "( )"}
"""
What shtab uses for an argument such as a channel.

Without it, zsh shows the argument's description when an option is completed there, and inserts the
option only when Tab is pressed again.
"""


def add_completion(parser: Parser) -> None:
    """Add the arguments of ``completion``."""
    parser.set_command(
        _completion,
        arguments="SHELL",
        description=(
            "Print a script that completes command lines in a shell.\n\n"
            f"It completes the commands of {NAME}, their options, and the choices and\n"
            "files that these take. This command requires the extra 'cli'."
        ),
        examples=(
            "  # bash: in this shell, and in all new ones\n"
            f"  source <({NAME} completion bash)\n"
            f"  echo 'source <({NAME} completion bash)' >> ~/.bashrc\n\n"
            "  # zsh: in a directory of $fpath, before compinit runs\n"
            f"  {NAME} completion zsh > ~/.zfunc/_{NAME}\n\n"
            "  # fish\n"
            f"  {NAME} completion fish > ~/.config/fish/completions/{NAME}.fish"
        ),
    )
    parser.add_argument("shell", choices=_SHELLS, metavar="SHELL", help="bash, zsh or fish")


async def _completion(arguments: argparse.Namespace) -> None:
    # Importing modules reads files.
    script = await to_thread.run_sync(_make_script, arguments.shell)
    print_line("", styled=script)


def _make_script(shell: str) -> str:
    try:
        import shtab
    except ImportError:
        raise CommandError(
            "completion requires the extra 'cli': pip install '.[cli]' in a checkout"
        ) from None
    parser, *commands = make_all_parsers()
    for command in commands:
        # argparse has no public list of arguments; shtab reads the same attribute.
        for argument in command._actions:
            if argument.metavar == "FILE":
                argument.complete = shtab.FILE  # type: ignore[attr-defined]  # for shtab
            elif not argument.option_strings and argument.choices is None:
                argument.complete = _NO_CHOICES  # type: ignore[attr-defined]  # for shtab
    return shtab.complete(parser, shell)
