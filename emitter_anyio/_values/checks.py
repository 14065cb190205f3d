"""What the arguments of a call must be: their types and ranges, and text as a plain ``str``.

A subclass of ``str`` or ``int``, such as a member of an ``Enum``, may format, compare and hash in
its own way, so each check returns the plain value, and only that is sent and kept.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from typing import Any, Final, TypeGuard, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

MAX_INT32: Final = 2**31 - 1


def is_int(value: object) -> TypeGuard[int]:
    """Tell whether something is an ``int``, and no ``bool`` in its place."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether something is an ``int`` or ``float``, and no ``bool`` in its place."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_text(name: str, value: object, hint: str = "") -> str:
    """
    Check that an argument is text.

    :param hint: what else the error says of a good value
    :return: the text as a plain ``str``
    :raises TypeError: if it is not a ``str``
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str{hint}, not {type(value).__name__}")
    return str.__str__(value)


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """
    Check that an argument is one of some words.

    :raises TypeError: if it is not a ``str``
    :raises ValueError: if it is another one
    """
    text = check_text(name, value)
    if text not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {text!r}")
    return text


def check_flag(name: str, value: object) -> bool:
    """
    Check that an argument is ``True`` or ``False``.

    :raises TypeError: if it is something else
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, not {type(value).__name__}")
    return value


def check_int(name: str, value: object, least: int, most: int = MAX_INT32, unit: str = "") -> int:
    """
    Check that an argument is a whole number in a range.

    :param unit: what the error calls the unit of the range
    :raises TypeError: if it is not an ``int``
    :raises ValueError: if it is out of the range
    """
    if not is_int(value):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}{unit}, not {value}")
    return int(value)


def check_optional_int(name: str, value: object) -> int | None:
    """
    Check an option that is a whole number, or ``None``.

    :raises TypeError: if it is not an ``int``
    :raises ValueError: if it is negative or over 2³¹ - 1, which the broker does not take
    """
    return None if value is None else check_int(name, value, 0)


def check_seconds(name: str, value: object, least: float = 0, most: float = math.inf) -> float:
    """
    Check that an argument is a number of seconds in a range.

    :raises TypeError: if it is not an ``int`` or ``float``
    :raises ValueError: if it is out of the range, or not a number
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if not least <= value <= most:
        limits = f"from {least} to {most}" if most < math.inf else f"at least {least}"
        raise ValueError(f"{name} must be {limits} seconds, not {value}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large; use None for no limit") from None


def check_function(name: str, value: F) -> F:
    """
    Check that an argument can be called, and that a call of it does something.

    :raises TypeError: if it cannot be called, or is a generator function
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function, not {type(value).__name__}")
    for function in (value, type(value).__call__):
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{name} must be a function or coroutine function, not a generator function: "
                "calling that runs none of its code; remove the yield"
            )
    return value


def check_task_status(value: object) -> None:
    """
    Check that an argument is what a task group's or nursery's ``start()`` passes.

    :raises TypeError: if it has no method ``started``
    """
    if not callable(getattr(value, "started", None)):
        raise TypeError(
            f"task_status must have a method started(), not be a {type(value).__name__}; use "
            "await task_group.start(...)"
        )
