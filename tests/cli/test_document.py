"""docs/command-line.md: every command line of it is typed into a shell, in turn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from emitter_anyio._cli._main import _COMMANDS
from tests.support.background import Background
from tests.support.command import ROOT

TEXT = (ROOT / "docs/command-line.md").read_text()
BLOCKS = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
# An id first, for it may begin with a digit.
VARIES = re.compile(r"[A-Z0-9]{26}|\d[\d.,:]*|\"[^\"]*(…|T\d)[^\"]*\"|\"[-\w+/=]{32,}\"")


def lines_of(block: str) -> list[tuple[str, str]]:
    """Give each line that is typed, and what is printed then."""
    found = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    return [(typed, printed) for typed, printed in found]


def alike(text: str) -> str:
    """Take out what is another one each time."""
    # The dots stand for numbers, ids and times.
    return VARIES.sub("…", text)


def test_each_line(place: Background, tmp_path: Path) -> None:
    program = tmp_path / "emitter-anyio"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m emitter_anyio "$@"\n')
    program.chmod(0o755)
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("EMITTER_")
    }
    environment = {
        **inherited,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "EMITTER_URL": place.url,
        "EMITTER_SECRET": place.secret,
    }
    typed = [each for block in BLOCKS for each in lines_of(block)]
    # What runs until Ctrl-C is started by other tests.
    assert typed.pop(0)[0] == "emitter-anyio broker --port 0"
    for line, printed in typed:
        done = subprocess.run(
            line,
            check=False,
            shell=True,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, ""), line
        assert alike(done.stdout) == alike(printed), line


def test_each_command_is_there() -> None:
    names = {add.__name__.removeprefix("add_") for add in _COMMANDS} | {"unban"}
    assert names - {"demo", "license"} <= set(re.findall(r"emitter-anyio (\w+)", TEXT))
