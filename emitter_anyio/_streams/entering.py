"""What is entered for a stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Generic, TypeVar

from emitter_anyio._backend import Owner

T = TypeVar("T")


class Entering(Generic[T]):
    """
    To be entered with ``async with``, once.

    :param owner: whose event loop it is to be entered and left in
    :param make: makes what is entered
    """

    def __init__(self, owner: Owner, make: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._owner = owner
        self._make = make
        self._entered: AbstractAsyncContextManager[T] | None = None

    async def __aenter__(self) -> T:
        if self._entered is not None:
            raise RuntimeError("this was entered before: call again for another one")
        self._owner.check()
        self._entered = self._make()
        return await self._entered.__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # It swallows nothing, and says so by its type, for the sake of type checkers.
        assert self._entered is not None
        self._owner.check()
        await self._entered.__aexit__(exc_type, exc, traceback)
