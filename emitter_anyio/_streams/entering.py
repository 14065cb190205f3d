"""An asynchronous context manager that checks its event loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Generic, TypeVar

from emitter_anyio._backend import Owner

T_co = TypeVar("T_co", covariant=True)


class Entering(Generic[T_co]):
    """
    An asynchronous context manager, to be entered once with ``async with``.

    :param owner: the thread and event loop in which it must be entered and left
    :param make: makes the context manager that is entered
    """

    def __init__(self, owner: Owner, make: Callable[[], AbstractAsyncContextManager[T_co]]) -> None:
        self._owner = owner
        self._make = make
        self._entered: AbstractAsyncContextManager[T_co] | None = None

    async def __aenter__(self) -> T_co:
        if self._entered is not None:
            raise RuntimeError("cannot enter this object twice: call the method again")
        self._owner.check()
        self._entered = self._make()
        return await self._entered.__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Returns None, not bool, so that type checkers know that it suppresses no exception.
        assert self._entered is not None
        self._owner.check()
        await self._entered.__aexit__(exc_type, exc, traceback)
