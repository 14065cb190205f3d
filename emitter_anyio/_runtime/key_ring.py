"""Key functions: functions that stand where a key does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import anyio

from emitter_anyio._values.channels import Key, check_key
from emitter_anyio._values.errors import EmitterError

from .guard import Guard, UserCodeError

_CACHED_KEYS: Final = 1024


class _Asking:
    """The callers that want one key function's answer at the same time."""

    def __init__(self) -> None:
        self.lock = anyio.Lock()
        self.answers = 0

    def answered(self) -> None:
        self.answers += 1


class KeyRing:
    """
    The keys that key functions have returned.

    A function is called when its key is first used, and again when the broker has refused the key.
    Callers that want the same key at the same time share one call. Callers that restore a
    connection do not share it with those that wait for the connection.

    :param guard: calls the functions
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._known: dict[Callable[[], Awaitable[str]], str] = {}
        self._asking: dict[tuple[Callable[[], Awaitable[str]], bool], _Asking] = {}

    async def get(self, source: Key, *, restoring: bool = False) -> str:
        """Return the key that a ``key`` argument stands for."""
        if isinstance(source, str):
            return source
        known = self._known.get(source)
        return await self._ask(source, None, restoring) if known is None else known

    async def renew(self, source: Key, refused: str, *, restoring: bool = False) -> str:
        """Return another key than the refused one, or the same if there is no other."""
        if isinstance(source, str):
            return source
        known = self._known.get(source)
        if known is None or known == refused:
            known = await self._ask(source, refused, restoring)
        return known

    def known(self, source: Key) -> str | None:
        """Return the key that a ``key`` argument stands for, unless a call would be needed."""
        return source if isinstance(source, str) else self._known.get(source)

    def forget(self) -> None:
        """Forget all keys, because the broker has refused one without naming it."""
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
                key = check_key(await self._call(source))
                if len(self._known) >= _CACHED_KEYS:
                    self._known.clear()
                self._known[source] = key
                asking.answered()
                return key
        finally:
            if not asking.lock.statistics().tasks_waiting and not asking.lock.locked():
                self._asking.pop((source, restoring), None)

    async def _call(self, source: Callable[[], Awaitable[str]]) -> str:
        try:
            key: str = await self._guard.call(_only_async, source)
            return key
        except UserCodeError as exc:
            error = exc.error
        if not isinstance(error, Exception):
            # Raised as it is, it would look like a cancellation of the caller.
            raise EmitterError(
                "the function that gives the key has awaited a task or a future that was cancelled"
            ) from error
        raise error


async def _only_async(source: Callable[[], Awaitable[str]]) -> str:
    answer = source()
    if not isinstance(answer, Awaitable):
        raise TypeError(
            "a function that gives a key must be async: it returned "
            f"{type(answer).__name__}, which cannot be awaited"
        )
    return await answer
