"""Interactive shells on a pseudo-terminal, in which a test types a line with Tab."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from emitter_anyio._cli._arguments import NAME

from .command import clean_environment
from .terminal import terminal

# Each shell gets a function instead of the program, which writes the completed arguments to a file.
SHELLS: Final = {
    "bash": (
        ["bash", "--noprofile", "--norc", "-i"],
        "source SCRIPT\n" + NAME + '() { echo "$*" >> ran; }\n',
    ),
    "zsh": (
        ["zsh", "-f", "-i"],
        f"mkdir functions; cp SCRIPT functions/_{NAME}; fpath=(functions $fpath)\n"
        "autoload -U compinit && compinit -D -u\n" + NAME + '() { print -r -- "$*" >> ran }\n',
    ),
    "fish": (
        ["fish", "--no-config", "--interactive"],
        "source SCRIPT\nfunction " + NAME + '; echo "$argv" >> ran; end\n',
    ),
}
"""The command line of each shell, and the commands that load a script for completion."""

# Give the new process its own session, so that the shell controls the terminal.
_LOGIN: Final = "import os, sys; os.login_tty(0); os.execvp(sys.argv[1], sys.argv[1:])"


def complete(shell: str, script: Path, lines: Sequence[str], directory: Path) -> list[str]:
    """
    Type command lines in a shell, and return the arguments with which they ran.

    :param script: the file with the script for completion
    :param lines: the arguments to type, with a tab character where Tab is pressed
    :param directory: the current directory, for the names of files
    """
    command, setup = SHELLS[shell]
    with terminal() as screen:
        with subprocess.Popen(
            [sys.executable, "-c", _LOGIN, *command],
            stdin=screen.program_fd,
            stdout=screen.program_fd,
            stderr=screen.program_fd,
            cwd=directory,
            env=clean_environment({"TERM": "xterm", "HOME": str(directory), "HISTFILE": ""}),
        ) as process:
            try:
                screen.type(setup.replace("SCRIPT", str(script)).encode())
                for number, line in enumerate(lines):
                    # The typed line contains other characters than the output.
                    screen.type(f"echo READY''{number}\n".encode())
                    screen.wait_for(f"READY{number}")
                    screen.type(f"{NAME} {line}\n".encode())
                screen.type(b"exit\n")
                process.wait()
            finally:
                process.kill()
        screen.close_program_side()
    return (directory / "ran").read_text().splitlines()
