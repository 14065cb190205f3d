"""The code in the README and on the pages of ``docs/``, as blocks that can be run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tests.support.command import ROOT

DOCS = ROOT / "docs"

Kind: TypeAlias = Literal["program", "lines", "test", "shell"]

_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_RUN = re.compile(
    r"^(asyncio\.run\(main\(\)\)|(anyio|trio)\.run\(main|run_virtual\(main)[^\n]*\n", re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """
    A block of code.

    :ivar page: the name of its page
    :ivar line: the line on which it begins
    :ivar kind: ``program`` (it calls ``asyncio.run(main())``, ``anyio.run(main)``,
        ``trio.run(main)`` or ``run_virtual(main)``), ``lines`` (complete with their imports),
        ``test`` (a file for pytest) or ``shell``
    :ivar source: the code
    :ivar output: what it prints, from the block of text that follows
    :ivar config: the ``pyproject.toml`` of a file for pytest, from a block of the same section
    """

    page: str
    line: int
    kind: Kind
    source: str
    output: str
    config: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def backends(self) -> set[str]:
        """The backends on which the code runs: it may call only functions of one."""
        if re.search(r"\btrio\.", self.without_run):
            return {"trio"}
        if re.search(r"\basyncio\.", self.without_run):
            return {"asyncio"}
        return {"asyncio", "trio"}

    @property
    def in_virtual_time(self) -> bool:
        """Whether the code runs in virtual time."""
        return re.search(r"^run_virtual\(main", self.source, re.MULTILINE) is not None

    @property
    def without_run(self) -> str:
        """The code without the line that runs ``main``."""
        return _RUN.sub("", self.source)


def kind_of(language: str, source: str) -> Kind:
    if language == "sh":
        return "shell"
    if _RUN.search(source):
        return "program"
    return "test" if re.search(r"^(async )?def test_", source, re.MULTILINE) else "lines"


def blocks_of(page: Path) -> list[Block]:
    """
    Find the blocks of a page.

    :raises ValueError: if a block is neither code, nor what code prints, nor for Sphinx
    """
    text = page.read_text()
    found: list[Block] = []
    end = config_end = -1
    config = ""
    for match in _FENCE.finditer(text):
        language, source = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        where = f"{page.name}:{line}"
        if "\n## " in text[config_end : match.start()]:
            config = ""
        if language in ("python", "sh"):
            found.append(Block(page.name, line, kind_of(language, source), source, "", config))
            end = match.end()
        elif language == "toml":
            config, config_end = source, match.end()
        elif language == "text":
            if text[end : match.start()].strip() not in ("", "It prints:") or end < 0:
                raise ValueError(f"{where}: a block of text that does not follow code")
            last = found.pop()
            found.append(Block(last.page, last.line, last.kind, last.source, source))
        elif not language.startswith("{"):
            raise ValueError(f"{where}: expected a block of python, sh or toml, got {language!r}")
    return found


ELSEWHERE = {
    "command-line.md": "tests/cli/test_document.py",
    "examples.md": "tests/test_examples.py",
}
"""Pages with a test module of their own, which runs each block."""

PAGES = sorted(DOCS.glob("*.md"))
BLOCKS = [
    block
    for page in [ROOT / "README.md", *PAGES]
    if page.name not in ELSEWHERE
    for block in blocks_of(page)
]


def block_with(page: str, text: str) -> Block:
    """Return the block of a page that contains a text."""
    (block,) = (block for block in BLOCKS if block.page == page and text in block.source)
    return block


def defined_by(page: str, text: str) -> dict[str, Any]:
    """Run the block of a page that contains a text, and return what it defines."""
    block = block_with(page, text)
    names: dict[str, Any] = {"__name__": "the_page"}
    # Without this module's own "annotations", as users have it.
    exec(compile(block.source, str(block), "exec", dont_inherit=True), names)
    return names
