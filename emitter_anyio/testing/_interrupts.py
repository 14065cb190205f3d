"""Ctrl-C on Trio, which raises ``KeyboardInterrupt`` in the code that is running."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

_functions: list[Callable[..., Any]] = []


def uninterrupted(function: _Function) -> _Function:
    """
    Mark the function of a task: on Trio, ``KeyboardInterrupt`` is raised in the main task instead.

    Otherwise a broker in the program's own process could break off first, so that the program
    would end with the errors of lost connections.
    """
    _functions.append(function)
    return function


def defer_interrupts() -> None:
    """Tell Trio about the marked functions. Call this before their tasks start."""
    if (trio := sys.modules.get("trio")) is not None:
        while _functions:
            trio.lowlevel.enable_ki_protection(_functions.pop())
