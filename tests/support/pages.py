"""The code on the pages of ``docs/``, as blocks that can be run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from tests.support.command import ROOT

DOCS = ROOT / "docs"

Kind: TypeAlias = Literal["program", "piece", "test", "shell"]

_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_RUN = re.compile(r"^(anyio|trio)\.run\(main\)[^\n]*\n", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """
    A block of code.

    :ivar page: the name of its page
    :ivar line: where it begins there
    :ivar kind: ``program`` (it ends with ``anyio.run(main)``), ``piece`` (of the frame, the first
        program of ``start.md`` that has a place for it), ``test`` (a file for pytest) or ``shell``
    :ivar source: the code
    :ivar output: what it prints, by the block of text that follows
    """

    page: str
    line: int
    kind: Kind
    source: str
    output: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def trio_only(self) -> bool:
        return re.search(r"^trio\.run", self.source, re.MULTILINE) is not None

    @property
    def without_run(self) -> str:
        """The code without its last line, which runs ``main``."""
        return _RUN.sub("", self.source)


def kind_of(language: str, source: str) -> Kind:
    if language == "sh":
        return "shell"
    if _RUN.search(source):
        return "program"
    return "test" if re.search(r"^(async )?def test_", source, re.MULTILINE) else "piece"


def blocks_of(page: Path) -> list[Block]:
    """
    Find the blocks of a page.

    :raises ValueError: if there is one that is neither code, nor what code prints, nor for Sphinx
    """
    text = page.read_text()
    found: list[Block] = []
    end = -1
    for match in _FENCE.finditer(text):
        language, source = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        where = f"{page.name}:{line}"
        if language in ("python", "sh"):
            found.append(Block(page.name, line, kind_of(language, source), source, ""))
            end = match.end()
        elif language == "text":
            if text[end : match.start()].strip() not in ("", "It prints:") or end < 0:
                raise ValueError(f"{where}: text that is not what the code before it prints")
            last = found.pop()
            found.append(Block(last.page, last.line, last.kind, last.source, source))
        elif not language.startswith("{"):
            raise ValueError(f"{where}: a block of {language!r}, where there are python and sh")
    return found


ELSEWHERE = {
    "command-line.md": "tests/cli/test_document.py",
    "examples.md": "tests/test_examples.py",
}
"""Pages of which each block is run by a test of their own."""

PAGES = sorted(DOCS.glob("*.md"))
BLOCKS = [block for page in PAGES if page.name not in ELSEWHERE for block in blocks_of(page)]


def frame() -> str:
    """The program of ``start.md`` that has a place for pieces."""
    (found,) = (
        block.without_run
        for block in BLOCKS
        if block.page == "start.md" and "# the piece" in block.source
    )
    return found


def framed(block: Block) -> str:
    """A program of a piece."""
    before, indent, after = re.split(r"^( +)\.\.\. +# the piece\n", frame(), flags=re.MULTILINE)
    piece = "".join(
        f"{indent}{line}" if line.strip() else line for line in block.source.splitlines(True)
    )
    return f"{before}{piece}{after}"
