"""Checks of argument types and ranges.

Each check returns a plain ``str`` or ``int``, because a subclass (a member of an ``Enum``, for
example) might format, compare or hash differently. Only the plain value is sent or stored.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from typing import Any, Final, TypeGuard, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

MAX_INT32: Final = 2**31 - 1


def is_int(value: object) -> TypeGuard[int]:
    """Return whether a value is an ``int`` but not a ``bool``."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is an ``int`` or ``float`` but not a ``bool``."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_text(name: str, value: object, hint: str = "") -> str:
    """
    Check that an argument is a ``str``.

    :param hint: text to add to the expected type in the error message
    :return: the text as a plain ``str``
    :raises TypeError: if it is not a ``str``
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str{hint}, not {type(value).__name__}")
    return str.__str__(value)


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """
    Check that an argument is one of several strings.

    :raises TypeError: if it is not a ``str``
    :raises ValueError: if it is not one of the choices
    """
    text = check_text(name, value)
    if text not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {text!r}")
    return text


def check_flag(name: str, value: object) -> bool:
    """
    Check that an argument is a ``bool``.

    :raises TypeError: if it is not
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, not {type(value).__name__}")
    return value


def check_int(name: str, value: object, least: int, most: int = MAX_INT32, unit: str = "") -> int:
    """
    Check that an argument is an ``int`` in a range.

    :param unit: text to add to the range in the error message
    :raises TypeError: if it is not an ``int``
    :raises ValueError: if it is out of range
    """
    if not is_int(value):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}{unit}, not {value}")
    return int(value)


def check_optional_int(name: str, value: object) -> int | None:
    """
    Check that an argument is ``None`` or an ``int`` that the broker accepts.

    :raises TypeError: if it is neither
    :raises ValueError: if it is negative or over 2³¹ - 1
    """
    return None if value is None else check_int(name, value, 0)


def check_seconds(name: str, value: object, least: float = 0, most: float = math.inf) -> float:
    """
    Check that an argument is a number of seconds in a range.

    :raises TypeError: if it is not an ``int`` or ``float``
    :raises ValueError: if it is NaN or out of range
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if not least <= value <= most:
        limits = f"from {least} to {most}" if most < math.inf else f"at least {least}"
        raise ValueError(f"{name} must be {limits} seconds, not {value}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large; use math.inf for no limit") from None


def check_function(name: str, value: F) -> F:
    """
    Check that an argument can be called and is not a generator function.

    :raises TypeError: if it cannot be called, or is a generator function
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function, not {type(value).__name__}")
    for function in (value, type(value).__call__):
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{name} must be a function or coroutine function, not a generator function: "
                "calling it would not run its code; remove the yield"
            )
    return value


def check_sync_function(name: str, value: F) -> F:
    """
    Check that an argument can be called and returns its result immediately.

    :raises TypeError: if it cannot be called, or is a generator function or coroutine function
    """
    check_function(name, value)
    if any(map(inspect.iscoroutinefunction, (value, type(value).__call__))):
        raise TypeError(
            f"{name} must be a function, not a coroutine function: its result is not awaited"
        )
    return value


def check_task_status(value: object) -> None:
    """
    Check that an argument is the task status that ``start()`` of a task group or nursery passes.

    :raises TypeError: if it has no ``started()`` method
    """
    if not callable(getattr(value, "started", None)):
        raise TypeError(
            f"task_status must have a started() method, which {type(value).__name__} does not; "
            "use await task_group.start(...)"
        )
