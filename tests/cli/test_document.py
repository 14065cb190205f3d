"""Run every command line of docs/command-line.md in a shell, in order."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from emitter_anyio._cli._commands import COMMANDS, make_parser
from tests.support.background import Background
from tests.support.command import ROOT, clean_environment

TEXT = (ROOT / "docs/command-line.md").read_text()
BLOCKS = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
# Ids and names of nodes come first, because they may begin with a digit.
VARIES = re.compile(
    r"[A-Z0-9]{26}|[0-9a-f]{2}(?::[0-9a-f]{2}){5}|\d[\d.,:]*|\"[^\"]*(…|T\d)[^\"]*\"|\"[-\w+/=]{32,}\""
)


def lines_of(block: str) -> list[tuple[str, str]]:
    """Return each command line with its output."""
    found = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    return [(typed, printed) for typed, printed in found]


def normalize(text: str) -> str:
    """Replace numbers, ids and times, which differ in each run."""
    return VARIES.sub("…", text)


@contextlib.contextmanager
def in_background(
    line: str, printed: str, folder: Path, environment: dict[str, str]
) -> Iterator[None]:
    """Run a command line until the block ends; the block begins when the output was printed."""
    with subprocess.Popen(
        f"exec {line.removesuffix('&')}",
        shell=True,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == printed
            yield
            process.send_signal(signal.SIGINT)
            assert process.wait() == 130
        finally:
            process.kill()


def test_command_lines_print_the_shown_output(server: Background, tmp_path: Path) -> None:
    program = tmp_path / "emitter-anyio"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m emitter_anyio "$@"\n')
    program.chmod(0o755)
    environment = {
        **clean_environment(),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "EMITTER_URL": server.url,
        "EMITTER_SECRET": server.secret,
    }
    typed = [each for block in BLOCKS for each in lines_of(block)]
    # Other tests cover this command, which runs until Ctrl-C.
    assert typed.pop(0)[0] == "emitter-anyio broker --port 0"
    with contextlib.ExitStack() as running:
        for line, printed in typed:
            if line.endswith("&"):
                running.enter_context(in_background(line, printed, tmp_path, environment))
                continue
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
            assert normalize(done.stdout) == normalize(printed), line


def test_command_lines_beside_those_of_other_tools_are_valid() -> None:
    _, tables = TEXT.split("## Coming from mosquitto or NATS")
    found = [shlex.split(each) for each in re.findall(r"`emitter-anyio (.*?)`", tables)]
    known = [arguments for arguments in found if arguments[0] in COMMANDS]
    for arguments in known:
        make_parser(arguments).parse_args(arguments)
    names = {arguments[0] for arguments in known}
    assert names >= COMMANDS.keys() - {"demo", "license", "link", "unban"}


def test_all_commands_are_documented() -> None:
    assert COMMANDS.keys() - {"demo", "license"} <= set(re.findall(r"emitter-anyio (\w+)", TEXT))
