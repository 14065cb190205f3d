"""Keys that are given as functions."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final

import anyio

from emitter_anyio._values.channels import ChannelKey, KeyFunction, KeySource, check_key
from emitter_anyio._values.errors import EmitterError

from .guard import Guard, UserCodeError

_CACHED_KEYS: Final = 1024


class _SharedCall:
    """A call of a key function that several callers share."""

    def __init__(self) -> None:
        self.lock = anyio.Lock()
        self.answers = 0

    def note_answer(self) -> None:
        self.answers += 1


class KeyRing:
    """
    A cache of the keys that key functions have returned.

    A key function is called when its key is first used, and again after the broker has refused the
    key. Concurrent callers share one call. Callers that restore a connection do not share it with
    callers that wait for the connection, because each would wait for the other.

    :param guard: calls the key functions
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._known: dict[KeyFunction, str] = {}
        self._calls: dict[tuple[KeyFunction, bool], _SharedCall] = {}

    async def get(self, source: KeySource, *, restoring: bool = False) -> str:
        """Return the key for a ``key`` argument, calling the key function if necessary."""
        if isinstance(source, str):
            return source
        known = self._known.get(source)
        return await self._call_once(source, None, restoring) if known is None else known

    async def renew(self, source: KeySource, refused: str, *, restoring: bool = False) -> str:
        """Return the key after the refusal of a key; a key function might return the same again."""
        if isinstance(source, str):
            return source
        known = self._known.get(source)
        if known is None or known == refused:
            known = await self._call_once(source, refused, restoring)
        return known

    def known(self, source: KeySource) -> str | None:
        """Return the key for a ``key`` argument, or ``None`` if it is not known yet."""
        return source if isinstance(source, str) else self._known.get(source)

    def forget(self) -> None:
        """Forget all keys, because the broker has refused one of them without naming it."""
        self._known.clear()

    async def _call_once(self, source: KeyFunction, refused: str | None, restoring: bool) -> str:
        call = self._calls.setdefault((source, restoring), _SharedCall())
        answers = call.answers
        try:
            async with call.lock:
                known = self._known.get(source)
                if known is not None and (known != refused or call.answers > answers):
                    return known
                key = check_key(await self._call_function(source))
                if len(self._known) >= _CACHED_KEYS:
                    self._known.clear()
                self._known[source] = key
                call.note_answer()
                return key
        finally:
            if not call.lock.statistics().tasks_waiting and not call.lock.locked():
                self._calls.pop((source, restoring), None)

    async def _call_function(self, source: KeyFunction) -> str | ChannelKey:
        try:
            key: str | ChannelKey = await self._guard.call(_only_async, source)
            return key
        except UserCodeError as exc:
            error = exc.error
        if not isinstance(error, Exception):
            # Raised unchanged, it would look like a cancellation of the caller.
            raise EmitterError(
                "could not get a key: the key function awaited a task or future that was cancelled"
            ) from error
        raise error


async def _only_async(source: KeyFunction) -> str | ChannelKey:
    answer = source()
    if not isinstance(answer, Awaitable):
        raise TypeError(
            f"invalid key function: it returned {type(answer).__name__}, which is not awaitable; "
            "define it with 'async def'"
        )
    return await answer
