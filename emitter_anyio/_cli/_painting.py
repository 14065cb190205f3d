"""
What is pretty: on a terminal only, and only where Rich is installed (the extra ``cli``).

Without it everything is there, in plain lines. This is the only module that imports Rich.
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
    """Give Rich's view of a terminal that can do more than print lines."""
    if stream is None or not is_terminal(stream):
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    return None if console.is_dumb_terminal else console


def painter(stream: TextIO | None) -> Callable[[str, str], str]:
    """
    Make what gives text a style of Rich's, such as ``"dim"`` or ``"bold red"``.

    :param stream: where the text will go; on what is no terminal it stays as it is
    """
    console = _console(stream)
    if console is None:
        return lambda text, style: text

    from rich.text import Text

    def paint(text: str, style: str) -> str:
        with console.capture() as captured:
            console.print(Text(text, style), end="", soft_wrap=True)
        return captured.get()

    return paint


@contextmanager
def board(title: str) -> Iterator[Callable[[str, Sequence[Sequence[str]], str], None] | None]:
    """
    Keep a table on the terminal up to date for a block.

    :param title: what is above it
    :return: what shows it anew: the figure behind the title, its rows, and a line below it;
        ``None`` where there can be no such thing
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

        # Without its own thread, which would draw in between at any time.
        with Live(console=console, auto_refresh=False) as live:

            def show(figure: str, rows: Sequence[Sequence[str]], below: str) -> None:
                table = Table("who", "since", "connection", box=SIMPLE_HEAD)
                for first, *others in rows:
                    table.add_row(Text(first, "bold green"), *map(Text, others))
                above = Text.assemble((title, "bold"), f"  {figure}")
                live.update(Group(above, table, Text(below, "dim")), refresh=True)

            yield show


@contextmanager
def progress(what: str, most: int) -> Iterator[Callable[[int], None]]:
    """
    Show on a terminal at stderr how far something has come, until the block ends.

    :param what: what is going on
    :param most: what it may come to; 0 shows nothing
    :return: to be told each time how much was added
    """
    console = _console(sys.stderr)
    if console is None or not most:
        yield lambda number: None
        return

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=most)

        yield partial(bar.advance, task)
