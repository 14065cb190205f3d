"""Keys that renew themselves: functions that stand where a key does."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Final

import anyio

from ._channels import Key, check_key
from ._errors import EmitterError
from ._guard import Guard

_KNOWN: Final = 1024
"""The answers of so many functions are kept."""


class _Asking:
    """Those who want one answer at one time."""

    def __init__(self) -> None:
        self.lock = anyio.Lock()
        self.answers = 0


class KeyRing:
    """
    What the functions that stand for keys have answered.

    A function is asked when its key is first used, and again when the broker has refused what it
    answered. Those who want the same answer at the same time ask once; but while subscriptions are
    restored, they do not wait for those who wait for that.
    """

    def __init__(self) -> None:
        self._known: dict[Callable[[], Awaitable[str]], str] = {}
        self._asking: dict[tuple[Callable[[], Awaitable[str]], bool], _Asking] = {}

    async def get(self, source: Key, *, restoring: bool = False) -> str:
        """Give the key that something stands for, and ask for it if it is not known."""
        if isinstance(source, str):
            return source
        known = self._known.get(source)
        return await self._ask(source, None, restoring) if known is None else known

    async def renew(self, source: Key, refused: str, *, restoring: bool = False) -> str:
        """Give another key for one that was refused, or the same if there is no other."""
        if isinstance(source, str):
            return source
        known = self._known.get(source)
        if known is None or known == refused:
            known = await self._ask(source, refused, restoring)
        return known

    def known(self, source: Key) -> str | None:
        """Give the key that something stands for, if it is known."""
        return source if isinstance(source, str) else self._known.get(source)

    def doubt(self) -> None:
        """Ask every function again: one of the keys was refused, and it is not known which."""
        self._known.clear()

    async def _ask(
        self, source: Callable[[], Awaitable[str]], refused: str | None, restoring: bool
    ) -> str:
        asking = self._asking.setdefault((source, restoring), _Asking())
        answers = asking.answers
        try:
            async with asking.lock:
                known = self._known.get(source)
                if known is not None and (known != refused or asking.answers > answers):
                    return known
                key = check_key(await _answer(source))
                if len(self._known) >= _KNOWN:
                    self._known.clear()
                self._known[source] = key
                asking.answers += 1
                return key
        finally:
            if not asking.lock.statistics().tasks_waiting and not asking.lock.locked():
                self._asking.pop((source, restoring), None)


async def _answer(source: Callable[[], Awaitable[str]]) -> str:
    guard = Guard()
    try:
        answer = source()
        if not inspect.isawaitable(answer):
            raise TypeError(
                "a function that gives a key must be async: it returned "
                f"{type(answer).__name__}, which cannot be awaited"
            )
        return await answer
    except BaseException as exc:
        if isinstance(exc, Exception) or not guard.is_of_user(exc):
            raise
        # As it is, it would pass for a cancellation of the one who asks.
        raise EmitterError(
            "the function that gives the key has awaited a task or a future that was cancelled"
        ) from exc
