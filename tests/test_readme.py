"""
The README: its commands work, its files exist, and its first program runs as a user would run it.

``tests/test_docs.py`` runs every block of it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.command import ROOT, run
from tests.support.pages import BLOCKS

README = (ROOT / "README.md").read_text()
PROGRAM = next(block for block in BLOCKS if block.page == "README.md" and block.kind == "program")


@pytest.mark.parametrize(
    "command",
    [
        "python -m pip install . && python -m emitter_anyio demo",
        "python -m pip install nox && python -m nox",
    ],
)
def test_each_of_the_two_commands_is_one_line(command: str) -> None:
    assert command in README.splitlines()


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\((?!https:)([^)#]+)", README)
    assert links
    for name in links:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("imported", "call"),
    [("asyncio", "asyncio.run(main())"), ("anyio", "anyio.run(main)"), ("trio", "trio.run(main)")],
)
def test_the_first_program_runs_in_three_ways(imported: str, call: str, tmp_path: Path) -> None:
    assert f"`{call}`" in README or call in PROGRAM.source
    program = tmp_path / "program.py"
    program.write_text(f"import {imported}\n{PROGRAM.without_run}{call}\n")
    done = run(str(program))
    assert (done.returncode, done.stderr, done.stdout) == (0, "", PROGRAM.output)
