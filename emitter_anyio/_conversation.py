"""Asking the broker and waiting for what it says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Final, Literal, TypeAlias, TypeVar

import anyio
from anyio.lowlevel import checkpoint

from ._channels import Key
from ._checks import check_seconds
from ._connection import Connection
from ._errors import (
    MessageTooLargeError,
    NotFoundError,
    RequestTimeoutError,
    UnauthorizedError,
)
from ._life import Life
from ._limits import Limit, OwnLimit
from ._pending import Pending
from ._requests import Request

T = TypeVar("T")


class _Default(Enum):
    """Stands for the client's own ``request_timeout``."""

    TIMEOUT = "request_timeout"


DEFAULT: Final = _Default.TIMEOUT

Timeout: TypeAlias = float | None | Literal[_Default.TIMEOUT]
"""Seconds to wait for the broker; ``None`` waits for ever."""


def check_timeout(timeout: Timeout) -> Timeout:
    """
    Check how long a call is to wait.

    :raises TypeError: if it is not a number
    :raises ValueError: if it is negative
    """
    if timeout is None or timeout is DEFAULT:
        return timeout
    return check_seconds("timeout", timeout)


class Conversation(Life):
    """What every verb does: wait for room, ask with no await in between, wait for the answer."""

    async def _room(self) -> None:
        """Wait until a packet may be queued; nothing may be awaited before it is."""
        self._owner.check()
        link = self._connection
        if (
            link is not None
            and self._usable(link)
            and link.writer.has_room
            and not self._session.full
        ):
            return
        link = None
        while not self._usable(link):
            link = await self._linked()
            if not link.writer.has_room:
                await link.writer.room()
            while self._session.full and self._usable(link):
                freed = anyio.Event()
                self._session.call_when_free(freed.set)
                await freed.wait()

    async def _keyed(self, source: Key, use: Callable[[str], Awaitable[T]]) -> T:
        """
        Do something with a key. If the broker refuses one that a function has given, the function
        is asked for another one, once.
        """
        if isinstance(source, str):
            return await use(source)
        key = await self._key_of(source)
        try:
            return await use(key)
        except (UnauthorizedError, NotFoundError):
            # A secret that is not the broker's may be one of a contract that it does not find.
            renewed = await self._key_of(source, key)
            if renewed == key:
                raise
        return await use(renewed)

    async def _key_of(self, source: Key, refused: str | None = None) -> str:
        """Give a key, and another one than what was refused if there is one."""
        self._owner.check()
        restoring = self._restores()
        seconds = self._options.request_timeout if restoring else None
        with anyio.move_on_after(seconds):
            if refused is None:
                return await self._keys.get(source, restoring=restoring)
            return await self._keys.renew(source, refused, restoring=restoring)
        # All others would wait with it.
        raise TimeoutError(
            f"the function that gives the key did not answer within {seconds:g} s, while the link "
            "was being restored"
        )

    async def _request(self, request: Request[T], timeout: Timeout) -> T:
        self._check_size(request.topic.encode(), request.body, 1)
        await self._room()
        return await self._answer(self._session.request(request), timeout)

    async def _answer(self, pending: Pending[T], timeout: Timeout) -> T:
        """Wait for what the broker says, from the time that the question has left."""
        if pending.done:
            await checkpoint()
            return pending.result()
        link = self._connection
        assert link is not None
        over = link.make_wakeup()
        pending.call_when_done(wake := over.set)
        if timeout is DEFAULT and not self._restores():
            limit = None if link.limits is None else link.limits.add(wake)
        else:
            limit = self._own_limit(wake, link, timeout)
        pending.waiters += 1
        try:
            await over.wait()
        finally:
            pending.waiters -= 1
            pending.awaited = bool(pending.waiters)
            if limit is not None:
                limit.done = True
        if not pending.done:
            where = "" if pending.channel is None else f" {pending.channel!r}"
            raise RequestTimeoutError(
                f"{pending.operation}{where}: the broker did not answer within "
                f"{self._seconds(timeout):g} s; whether it took effect is unknown"
            )
        return pending.result()

    def _own_limit(
        self, wake: Callable[[], None], link: Connection, timeout: Timeout
    ) -> Limit | None:
        seconds = self._seconds(timeout)
        if seconds is None:
            return None
        session = self._session if self._restores() else None
        return OwnLimit(wake, seconds, link.timer, link.writer, session)

    def _seconds(self, timeout: Timeout) -> float | None:
        return self._options.request_timeout if timeout is DEFAULT else timeout

    def _check_size(self, topic: bytes, payload: bytes, qos: int) -> None:
        size = 2 + len(topic) + len(payload) + (2 if qos else 0)
        if size > self._options.max_message_size:
            raise MessageTooLargeError(
                f"the packet would have {size} bytes, {len(payload)} of them payload; the broker "
                f"closes the link at more than {self._options.max_message_size} "
                "(max_message_size)"
            )
