"""
Ctrl-C on Trio, which raises ``KeyboardInterrupt`` in any line of the code that is running.

asyncio cancels the main task instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

_functions: list[Callable[..., Any]] = []


def uninterrupted(function: _Function) -> _Function:
    """
    Mark a function: while Trio runs it, ``KeyboardInterrupt`` is raised in the main task instead.

    In the main task, it is raised where the function awaits. Use this for entering and leaving,
    which must not stop halfway, and for the tasks of a broker in the program's own process, which
    must not end before its clients.
    """
    _functions.append(function)
    return function


def mark_all(mark: Callable[[Callable[..., Any]], object]) -> None:
    """Pass all functions that have been marked since the last call to Trio's decorator."""
    while _functions:
        mark(_functions.pop())
