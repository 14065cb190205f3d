"""The error tree. What this library raises on purpose is an :class:`EmitterError`, but for
:class:`TypeError`, :class:`ValueError` and :class:`RuntimeError` where a call itself is wrong.

.. code-block:: text

    EmitterError
    ├── ConnectError                  a link could not be opened (every cause, by server)
    │   └── ConnectRefusedError       the broker's CONNACK said no
    ├── ConnectionLostError           an established link dropped; the outcome is unknown
    ├── ClosedError                   used outside the block
    ├── WrongLoopError                used from another thread or event loop
    ├── RequestTimeoutError           the broker did not answer in time
    ├── RemoteProtocolError           the peer sent nonsense
    ├── SlowConsumerError             a buffer was full, messages were dropped
    ├── SubscriptionConflictError     the broker cannot keep two subscriptions of one link apart
    ├── HandlerError                  an ``on()`` handler raised
    ├── ReplyError                    the handler that served a request() raised
    ├── DecodeError                   a message could not be decoded
    ├── InvalidChannelError           a channel that the broker would not take
    ├── MessageTooLargeError          more bytes than the broker takes
    └── RequestError                  the broker refused
        ├── BadRequestError           400
        ├── UnauthorizedError         401
        ├── PaymentRequiredError      402
        ├── ForbiddenError            403
        ├── NotFoundError             404
        ├── ServerError               5xx
        └── HistoryIncompleteError    stored messages that cannot be read
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Mapping
from datetime import datetime
from traceback import format_exception_only
from typing import Any

import anyio

from .messages import EmitterMessage


class EmitterError(Exception):
    """
    Base class of all the errors of this library.

    Every error can be pickled and copied, with its attributes, notes and ``__cause__``. A cause
    that cannot be pickled is replaced by an :exc:`Exception` with its type and text.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # Not by calling the class, as Exception does: some take arguments that are not in `args`.
        state = dict(vars(self))
        if self.__cause__ is not None:
            state["__cause__"] = make_picklable(self.__cause__)
        new = copyreg.__newobj__  # type: ignore[attr-defined]  # typeshed does not list it
        return new, (type(self), *self.args), state


def make_picklable(error: BaseException) -> BaseException:
    """Return an error if it can be pickled, else an :exc:`Exception` with its type and text."""
    if isinstance(error, EmitterError):
        return error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return Exception("".join(format_exception_only(error)).strip())
    return error


class ConnectError(EmitterError):
    """
    No link to a broker could be opened.

    :ivar causes: what went wrong, by server (a URL without user and password)
    """

    def __init__(self, message: str, causes: Mapping[str, Exception] | None = None) -> None:
        super().__init__(message)
        self.causes: Mapping[str, Exception] = dict(causes or {})

    def __reduce__(self) -> tuple[Any, ...]:
        new, arguments, state = super().__reduce__()
        causes = {server: make_picklable(cause) for server, cause in self.causes.items()}
        return new, arguments, {**state, "causes": causes}


class ConnectRefusedError(ConnectError):
    """
    The broker answered CONNECT with a refusal.

    :ivar code: the return code of the CONNACK packet, 1 to 5 in MQTT 3.1.1
    """

    def __init__(
        self, message: str, causes: Mapping[str, Exception] | None = None, *, code: int = 0
    ) -> None:
        super().__init__(message, causes)
        self.code = code


class ConnectionLostError(EmitterError, anyio.BrokenResourceError):
    """
    An established link dropped: whether what was under way took effect is unknown.

    :ivar unread: the messages that were received and that no consumer had read when the link was
        gone for good
    """

    def __init__(self, message: str, unread: list[EmitterMessage] | None = None) -> None:
        super().__init__(message)
        self.unread: list[EmitterMessage] = [] if unread is None else unread


class ClosedError(EmitterError, anyio.ClosedResourceError):
    """The client was used before it was entered or after it was left."""


class WrongLoopError(EmitterError, RuntimeError):
    """
    The client or a stream was used from another thread or event loop than its own.

    Nothing was done: the client and its tasks go on. Other threads call it by
    ``anyio.from_thread.run()``, or through a blocking portal of its event loop.
    """


class RequestTimeoutError(EmitterError, TimeoutError):
    """The broker did not answer in time; whether the request took effect is unknown."""


class RemoteProtocolError(EmitterError):
    """The peer sent something that MQTT 3.1.1, or Emitter on top of it, does not allow."""


class SlowConsumerError(EmitterError):
    """
    A buffer was full and messages were dropped, at this place between the messages.

    :ivar dropped: how many messages are missing here
    """

    def __init__(self, message: str, *, dropped: int) -> None:
        super().__init__(message)
        self.dropped = dropped


class SubscriptionConflictError(EmitterError):
    """The broker cannot keep this subscription apart from another one of the same link."""


class HandlerError(EmitterError):
    """
    A handler registered with ``on()`` raised; ``__cause__`` is what it raised.

    :ivar event: the event that it handled
    """

    def __init__(self, message: str, *, event: str) -> None:
        super().__init__(message)
        self.event = event


class ReplyError(EmitterError):
    """The handler that served a ``request()`` raised, at the other client."""


class DecodeError(EmitterError, ValueError):
    """
    The function that decodes the messages of a stream raised; ``__cause__`` is what it raised.

    :ivar message: the message that it was given
    """

    def __init__(self, text: str, *, message: EmitterMessage) -> None:
        super().__init__(text)
        self.message = message


class InvalidChannelError(EmitterError, ValueError):
    """The channel is one that the broker would not take."""


class MessageTooLargeError(EmitterError, ValueError):
    """The packet has more bytes than the broker takes: it would close the link."""


class RequestError(EmitterError):
    """
    The broker refused what was asked.

    :ivar status: Emitter's status, as in HTTP; ``None`` where the broker acknowledged the request
        and sent no answer
    :ivar message: the broker's own words, on one line and cut after 200 characters
    :ivar operation: what was asked: ``"publish"``, ``"subscribe"``, ``"keygen"`` …
    :ivar channel: the channel it was asked for, without its key, or ``None``
    :ivar hint: the likely reasons for this very call
    """

    def __init__(
        self,
        status: int | None,
        message: str,
        *,
        operation: str,
        channel: str | None = None,
        hint: str | None = None,
    ) -> None:
        where = "" if channel is None else f" {channel!r}"
        code = "" if status is None else f"{status} "
        reasons = "" if hint is None else f" ({hint})"
        super().__init__(f"{operation}{where}: {code}{message}{reasons}")
        self.status = status
        self.message = message
        self.operation = operation
        self.channel = channel
        self.hint = hint


class BadRequestError(RequestError):
    """400: the broker could not make sense of the request."""


class UnauthorizedError(RequestError):
    """401: the key does not open this channel for this operation."""


class PaymentRequiredError(RequestError):
    """402: the contract does not cover the request."""


class ForbiddenError(RequestError):
    """403: the broker does not do this for anybody, such as publishing to a wildcard."""


class NotFoundError(RequestError):
    """404: there is no such request, or no such contract."""


class ServerError(RequestError):
    """5xx: the broker failed."""


class HistoryIncompleteError(RequestError):
    """
    Stored messages that could not be read, at their place between the others.

    Iteration can go on after it.

    :ivar since: the first second of the period that they are from
    :ivar until: its last second
    """

    def __init__(self, reason: str, *, channel: str, since: datetime, until: datetime) -> None:
        super().__init__(
            None,
            f"stored messages from {since:%Y-%m-%dT%H:%M:%SZ} to {until:%Y-%m-%dT%H:%M:%SZ} could "
            f"not be read: {reason}; iterate further to read the others",
            operation="history",
            channel=channel,
        )
        self.since = since
        self.until = until


_BY_STATUS: dict[int, type[RequestError]] = {
    400: BadRequestError,
    401: UnauthorizedError,
    402: PaymentRequiredError,
    403: ForbiddenError,
    404: NotFoundError,
}


def make_request_error(
    status: int | None,
    message: str,
    *,
    operation: str,
    channel: str | None = None,
    hint: str | None = None,
) -> RequestError:
    """Make the error of the tree that belongs to a status."""
    kind = RequestError
    if status is not None:
        kind = ServerError if 500 <= status < 600 else _BY_STATUS.get(status, RequestError)
    return kind(status, message, operation=operation, channel=channel, hint=hint)
