"""
Colours, a live table and a progress bar, on terminals where Rich is installed (the extra ``cli``).

This is the only module that imports Rich. Without Rich, the same content is printed as plain lines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TextIO

from ._output import is_terminal

if TYPE_CHECKING:
    from rich.console import Console


def _console(stream: TextIO | None) -> Console | None:
    """Return a console if the stream is a terminal that can move its cursor."""
    if stream is None or not is_terminal(stream):
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    return None if console.is_dumb_terminal else console


def make_styler(stream: TextIO | None) -> Callable[[str, str], str]:
    """
    Return a function that gives text a Rich style, such as ``"dim"`` or ``"bold red"``.

    :param stream: the output; the function returns the text unchanged unless this is a terminal
    """
    console = _console(stream)
    if console is None:
        return lambda text, style: text

    from rich.text import Text

    def apply(text: str, style: str) -> str:
        with console.capture() as captured:
            console.print(Text(text, style), end="", soft_wrap=True)
        return captured.get()

    return apply


@contextmanager
def live_table(
    title: str, columns: Sequence[str]
) -> Iterator[Callable[[str, Sequence[Sequence[str]], str], None] | None]:
    """
    Show a table on the terminal until the block ends.

    :param title: the heading above the table
    :param columns: the headings of the columns
    :return: a function that updates the table, with the text after the title, the rows, and the
        line below the table; ``None`` if standard output cannot show a table
    """
    console = _console(sys.stdout)
    if console is None:
        yield None
    else:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        # auto_refresh would draw from another thread, while notes are printed.
        with Live(console=console, auto_refresh=False) as live:

            def update(summary: str, rows: Sequence[Sequence[str]], footer: str) -> None:
                table = Table(*columns, box=SIMPLE_HEAD)
                for first, *others in rows:
                    table.add_row(Text(first, "bold green"), *map(Text, others))
                heading = Text.assemble((title, "bold"), f"  {summary}")
                live.update(Group(heading, table, Text(footer, "dim")), refresh=True)

            yield update


@contextmanager
def progress(
    description: str, total: int, *, size: bool = False
) -> Iterator[Callable[[int], None]]:
    """
    Show a progress bar until the block ends, if stderr is a terminal.

    :param description: the text before the bar
    :param total: the number of steps; 0 shows no bar
    :param size: whether the steps are bytes
    :return: a function that advances the bar by a number of steps
    """
    console = _console(sys.stderr)
    if console is None or not total:
        yield lambda number: None
        return

    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
    )

    done = DownloadColumn() if size else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), done)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)

        yield partial(bar.advance, task)
