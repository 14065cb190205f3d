"""Requests: waiting for queue space, sending, and awaiting the reply."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum
from time import perf_counter
from typing import Final, Literal, TypeAlias, TypeVar

import anyio
from anyio.lowlevel import checkpoint

from emitter_anyio._net.connection import Connection
from emitter_anyio._net.options import Options
from emitter_anyio._net.timer import ReplyDeadline
from emitter_anyio._protocol.pending import Pending
from emitter_anyio._protocol.session import Session
from emitter_anyio._values.channels import KeySource
from emitter_anyio._values.checks import check_seconds
from emitter_anyio._values.errors import (
    MessageTooLargeError,
    NotFoundError,
    RequestTimeoutError,
    UnauthorizedError,
)
from emitter_anyio._values.messages import Payload, encode_payload
from emitter_anyio._values.requests import Request

from .key_ring import KeyRing
from .slot import Permit, Slot

T = TypeVar("T")


class _Default(Enum):
    """The type of :data:`DEFAULT`."""

    TIMEOUT = "request_timeout"


DEFAULT: Final = _Default.TIMEOUT
"""The ``request_timeout`` of the client."""

Timeout: TypeAlias = float | None | Literal[_Default.TIMEOUT]
"""The maximum number of seconds to wait for a reply; ``None``: without limit."""


def check_timeout(timeout: Timeout) -> Timeout:
    """
    Check a ``timeout`` argument.

    :return: the argument
    :raises TypeError: if it is not a number
    :raises ValueError: if it is negative
    """
    if timeout is None or timeout is DEFAULT:
        return timeout
    return check_seconds("timeout", timeout)


class Requester:
    """
    Waits for queue space, sends requests, and awaits their replies.

    Nothing is awaited between the end of the wait for space and queueing the packet. A cancelled
    call has thus either sent nothing or registered its request.

    :param slot: the state of the client
    :param keys: the keys that key functions have returned
    :param options: the options of the client
    :param bound: the connection that the calls of this requester restore; ``None`` for ordinary
        calls, which wait until it is restored
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
        """Return a requester whose calls restore a connection."""
        return Requester(self._slot, self._keys, self._options, connection)

    async def connected(self) -> Connection:
        """Wait until the caller may use a connection, and return it; see :meth:`Slot.connected`."""
        return await self._slot.connected(self._bound)

    async def space(self) -> Connection:
        """
        Wait until there is queue space for a packet.

        :return: the connection; the caller must queue its packet before awaiting anything else
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
        has_waited = False
        while True:
            connection = await slot.connected(bound, has_waited=has_waited)
            has_waited = True
            if not connection.writer.has_space:
                await connection.writer.wait_for_space()
            while connection.session.full and slot.usable(connection, bound):
                await connection.wait_for_packet_id(self._options.request_timeout)
            if slot.usable(connection, bound):
                return connection

    async def request(self, request: Request[T], timeout: Timeout) -> T:
        """
        Send a control request and await its reply.

        :return: the value of the reply
        :raises RequestError: if the broker refused the request
        :raises RequestTimeoutError: if there was no reply in time
        """
        return await self.answer(*await self.send(request), timeout)

    async def send(self, request: Request[T]) -> tuple[Connection, Pending[T]]:
        """Send a control request; return the connection and the pending packet."""
        self.check_size(request.topic.encode(), request.body, 1)
        connection = await self.space()
        return connection, connection.session.request(request)

    async def flush(self, timeout: Timeout) -> float:
        """
        Send a PINGREQ and await the PINGRESP.

        :return: the round-trip time in seconds
        :raises RequestError: if a QoS 0 publish was refused since the last flush; the first refusal
        """
        timeout = check_timeout(timeout)
        connection = await self.space()
        # Not the event loop's clock, which uvloop updates only once per iteration, in milliseconds.
        start = perf_counter()
        refusal = await self.answer(connection, connection.session.ping(), timeout)
        if refusal is not None:
            raise refusal
        return perf_counter() - start

    async def answer(self, connection: Connection, pending: Pending[T], timeout: Timeout) -> T:
        """
        Await the outcome of a packet. The timeout runs from when its bytes were written.

        :return: the value of the reply
        :raises RequestTimeoutError: if there was no outcome in time
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
                f"{pending.operation}{where}: no reply from the broker within "
                f"{self.seconds(timeout):g} s; whether the request took effect is unknown"
            )
        return pending.result()

    def deadline(
        self, expired: Callable[[], object], connection: Connection, timeout: Timeout
    ) -> ReplyDeadline | None:
        """
        Start a deadline for the reply to the most recently queued packet.

        :param expired: called at the deadline
        :return: the deadline, which the caller must cancel; ``None`` without a timeout
        """
        seconds = self.seconds(timeout)
        if seconds is None:
            return None
        if not self._slot.restored and self._restores() is not None:
            expired = _unless_answering(connection.session, expired)
        return ReplyDeadline(expired, seconds, connection.timer, connection.writer)

    def seconds(self, timeout: Timeout) -> float | None:
        """Return the timeout in seconds for a ``timeout`` argument."""
        return self._options.request_timeout if timeout is DEFAULT else timeout

    def encode(self, message: Payload) -> bytes:
        """
        Encode a message to publish.

        :raises TypeError: if it is neither bytes-like, nor ``str``, nor JSON-serializable
        :raises ValueError: if it cannot be encoded as UTF-8 or JSON
        """
        return encode_payload(message, self._options.json_encoder)

    def check_size(self, topic: bytes, payload: bytes, qos: int) -> None:
        """
        Check the size of a PUBLISH.

        :raises MessageTooLargeError: if it is larger than the broker takes
        """
        size = 2 + len(topic) + len(payload) + (2 if qos else 0)
        if size > self._options.max_message_size:
            raise MessageTooLargeError(
                f"the message is too large: its packet would have {size} bytes, "
                f"{len(payload)} of them payload, and the maximum is "
                f"{self._options.max_message_size} bytes (max_message_size)"
            )

    # Keys

    async def with_key(self, source: KeySource, use: Callable[[str], Awaitable[T]]) -> T:
        """
        Call a function with the key for a ``key`` argument.

        If the broker refuses a key that a key function has returned, call the key function once
        more, and try again with the new key.

        :return: the result of the function
        """
        if isinstance(source, str):
            return await use(source)
        key = await self.key_of(source)
        try:
            return await use(key)
        except (UnauthorizedError, NotFoundError):
            # Emitter answers 404 to the secret key of another broker, whose contract it lacks.
            renewed = await self.key_of(source, key)
            if renewed == key:
                raise
        return await use(renewed)

    async def key_of(self, source: KeySource, refused: str | None = None) -> str:
        """
        Return the key for a ``key`` argument.

        :param refused: a key that the broker has refused, to be replaced
        :raises TimeoutError: if a key function takes too long while a connection is being restored
        """
        self._owner.check()
        connection = self._restores()
        if connection is None:
            return await self._key_of(source, refused, restoring=False)
        seconds = self._options.request_timeout
        with anyio.move_on_after(seconds), Permit(connection):
            return await self._key_of(source, refused, restoring=True)
        # All other calls wait until the connection is restored, so limit the time.
        raise TimeoutError(
            f"could not get a key: the key function did not return within {seconds:g} s while the "
            "connection was being restored"
        )

    async def _key_of(self, source: KeySource, refused: str | None, *, restoring: bool) -> str:
        if refused is None:
            return await self._keys.get(source, restoring=restoring)
        return await self._keys.renew(source, refused, restoring=restoring)

    def _restores(self) -> Connection | None:
        return self._bound or self._slot.permitted()


def _unless_answering(session: Session, expired: Callable[[], object]) -> Callable[[], bool]:
    """
    Return a callback for :class:`ReplyDeadline` that extends the deadline while replies arrive.

    All requests that restore a connection are sent together, and the broker answers them one after
    another. The deadline is extended at least once, because a restarted broker is busy.
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
