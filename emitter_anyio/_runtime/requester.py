"""Requests to the broker: waiting for queue space, sending, and awaiting the reply."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Final, Literal, TypeAlias, TypeVar

import anyio
from anyio.lowlevel import checkpoint

from emitter_anyio._net.connection import Connection
from emitter_anyio._net.options import Options
from emitter_anyio._net.timer import ReplyDeadline
from emitter_anyio._protocol.pending import Pending
from emitter_anyio._protocol.session import Session
from emitter_anyio._values.channels import Key
from emitter_anyio._values.checks import check_seconds
from emitter_anyio._values.errors import (
    MessageTooLargeError,
    NotFoundError,
    RequestTimeoutError,
    UnauthorizedError,
)
from emitter_anyio._values.requests import Request

from .key_ring import KeyRing
from .slot import Permit, Slot

T = TypeVar("T")


class _Default(Enum):
    """Stands for the client's ``request_timeout``."""

    TIMEOUT = "request_timeout"


DEFAULT: Final = _Default.TIMEOUT

Timeout: TypeAlias = float | None | Literal[_Default.TIMEOUT]
"""Seconds to wait for a reply; ``None`` waits without a limit."""


def check_timeout(timeout: Timeout) -> Timeout:
    """
    Check a ``timeout`` argument.

    :raises TypeError: if it is not a number
    :raises ValueError: if it is negative
    """
    if timeout is None or timeout is DEFAULT:
        return timeout
    return check_seconds("timeout", timeout)


class Requester:
    """
    What every method that needs the broker does: wait for queue space, send, await the reply.

    Between waiting for space and queueing a packet nothing is awaited, so that a cancelled call has
    either sent nothing or is expecting its reply.

    :param slot: the present connection
    :param keys: the keys that functions have returned
    :param options: the client's options
    :param bound: the connection that is being restored by this requester's calls, which all other
        calls have to wait for; ``None`` is for ordinary calls
    """

    def __init__(
        self,
        slot: Slot,
        keys: KeyRing,
        options: Options,
        bound: Connection | None = None,
    ) -> None:
        self._slot = slot
        self._owner = slot.owner
        self._keys = keys
        self._options = options
        self._bound = bound

    def bind(self, connection: Connection) -> Requester:
        """Make a requester that restores a connection."""
        return Requester(self._slot, self._keys, self._options, connection)

    async def connected(self) -> Connection:
        """Wait for a connection to use, as :meth:`Slot.connected` does."""
        return await self._slot.connected(self._bound)

    async def space(self) -> Connection:
        """
        Wait until a packet may be queued.

        :return: the connection, to be used before anything else is awaited
        """
        self._owner.check()
        slot, bound = self._slot, self._bound
        connection = slot.connection
        if (
            connection is not None
            and slot.usable(connection, bound)
            and connection.writer.has_space
            and not connection.session.full
        ):
            return connection
        while True:
            connection = await slot.connected(bound)
            if not connection.writer.has_space:
                await connection.writer.wait_for_space()
            while connection.session.full and slot.usable(connection, bound):
                freed = anyio.Event()
                connection.session.call_when_free(freed.set)
                await freed.wait()
            if slot.usable(connection, bound):
                return connection

    async def request(self, request: Request[T], timeout: Timeout) -> T:
        """
        Send a control request and await its reply.

        :raises RequestError: if the broker refused
        :raises RequestTimeoutError: if there was no reply in time
        """
        return await self.answer(*await self.send(request), timeout)

    async def send(self, request: Request[T]) -> tuple[Connection, Pending[T]]:
        """Send a control request."""
        self.check_size(request.topic.encode(), request.body, 1)
        connection = await self.space()
        return connection, connection.session.request(request)

    async def flush(self, timeout: Timeout) -> float:
        """
        Send a PINGREQ and await the PINGRESP.

        :return: the round trip in seconds
        :raises RequestError: the first refusal of a QoS 0 publish since the last flush
        """
        timeout = check_timeout(timeout)
        connection = await self.space()
        start = anyio.current_time()
        refusal = await self.answer(connection, connection.session.ping(), timeout)
        if refusal is not None:
            raise refusal
        return anyio.current_time() - start

    async def answer(self, connection: Connection, pending: Pending[T], timeout: Timeout) -> T:
        """
        Await the outcome of a packet, and count the time from when its bytes were written.

        :raises RequestTimeoutError: if there was none in time
        """
        if pending.done:
            await checkpoint()
            return pending.result()
        over = connection.make_wakeup()
        pending.call_when_done(wake := over.set)
        deadline = self.deadline(wake, connection, timeout)
        pending.begin_wait()
        try:
            await over.wait()
        finally:
            pending.end_wait()
            if deadline is not None:
                deadline.cancel()
        if not pending.done:
            where = "" if pending.channel is None else f" {pending.channel!r}"
            raise RequestTimeoutError(
                f"{pending.operation}{where}: the broker did not answer within "
                f"{self.seconds(timeout):g} s; whether it took effect is unknown"
            )
        return pending.result()

    def deadline(
        self, expired: Callable[[], object], connection: Connection, timeout: Timeout
    ) -> ReplyDeadline | None:
        """
        Have a function called when the time for the reply to the packet queued last is over.

        :return: the deadline, to be cancelled
        """
        seconds = self.seconds(timeout)
        if seconds is None:
            return None
        if not self._slot.restored and self._restores() is not None:
            expired = _unless_answering(connection.session, expired)
        return ReplyDeadline(expired, seconds, connection.timer, connection.writer)

    def seconds(self, timeout: Timeout) -> float | None:
        """Return the seconds that a ``timeout`` argument stands for."""
        return self._options.request_timeout if timeout is DEFAULT else timeout

    def check_size(self, topic: bytes, payload: bytes, qos: int) -> None:
        """
        Check the size of a PUBLISH.

        :raises MessageTooLargeError: if the broker would close the connection because of it
        """
        size = 2 + len(topic) + len(payload) + (2 if qos else 0)
        if size > self._options.max_message_size:
            raise MessageTooLargeError(
                f"the packet would have {size} bytes, {len(payload)} of them payload; the broker "
                f"closes the link at more than {self._options.max_message_size} "
                "(max_message_size)"
            )

    # Keys

    async def with_key(self, source: Key, use: Callable[[str], Awaitable[T]]) -> T:
        """
        Call a function with a key.

        If the broker refuses a key that a key function has returned, the key function is called
        once more for another one.
        """
        if isinstance(source, str):
            return await use(source)
        key = await self.key_of(source)
        try:
            return await use(key)
        except (UnauthorizedError, NotFoundError):
            # The broker does not find the contract of a secret key that belongs to another one.
            renewed = await self.key_of(source, key)
            if renewed == key:
                raise
        return await use(renewed)

    async def key_of(self, source: Key, refused: str | None = None) -> str:
        """
        Return the key that a ``key`` argument stands for.

        :param refused: a key that the broker has refused: another one is wanted
        """
        self._owner.check()
        connection = self._restores()
        if connection is None:
            return await self._key_of(source, refused, restoring=False)
        seconds = self._options.request_timeout
        with anyio.move_on_after(seconds), Permit(connection):
            return await self._key_of(source, refused, restoring=True)
        # Every other call would wait with this one.
        raise TimeoutError(
            f"the function that gives the key did not answer within {seconds:g} s, while the link "
            "was being restored"
        )

    async def _key_of(self, source: Key, refused: str | None, *, restoring: bool) -> str:
        if refused is None:
            return await self._keys.get(source, restoring=restoring)
        return await self._keys.renew(source, refused, restoring=restoring)

    def _restores(self) -> Connection | None:
        return self._bound or self._slot.permitted()


def _unless_answering(session: Session, expired: Callable[[], object]) -> Callable[[], bool]:
    """
    Return a function for :class:`ReplyDeadline` that moves the deadline while there are replies.

    While a connection is restored, the broker gets all requests together and answers them one after
    another. The deadline moves once anyway, because a broker that has been restarted is busy.
    """
    answered = -1

    def check() -> bool:
        nonlocal answered
        if session.answered > answered:
            answered = session.answered
            return True
        expired()
        return False

    return check
