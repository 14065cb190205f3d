"""The exceptions of the library.

The library raises :class:`EmitterError`, except for invalid calls, which raise :class:`TypeError`,
:class:`ValueError` or :class:`RuntimeError`.

.. code-block:: text

    EmitterError
    ├── ConnectError                  no connection could be opened (every cause, by server)
    │   └── ConnectRefusedError       refused by CONNACK
    ├── ConnectionLostError           an established connection dropped; the outcome is unknown
    ├── ClosedError                   used outside the block
    ├── WrongLoopError                used from another thread or event loop
    ├── RequestTimeoutError           the broker did not reply in time
    ├── RemoteProtocolError           the peer violated the protocol
    ├── SlowConsumerError             a buffer was full and messages were dropped
    ├── SubscriptionConflictError     two subscriptions cannot share one connection
    ├── HandlerError                  an ``on()`` handler raised
    ├── ReplyError                    the handler that served a request() raised
    ├── DecodeError                   a message could not be decoded
    ├── InvalidChannelError           the broker would not accept the channel
    ├── MessageTooLargeError          larger than the broker accepts
    └── RequestError                  refused by the broker
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

from .messages import EmitterMessage, describe, may_contain_key
from .text import make_printable


class EmitterError(Exception):
    """
    The base class of all errors of this library.

    Every error can be pickled and copied with its attributes, notes and ``__cause__``. A cause that
    cannot be pickled is replaced by an :exc:`Exception` with its type and text.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception.__reduce__() calls the class with `args`, which lacks some classes' arguments.
        state = dict(vars(self))
        if self.__cause__ is not None:
            state["__cause__"] = make_picklable(self.__cause__)
        new = copyreg.__newobj__  # type: ignore[attr-defined]  # typeshed does not list it
        return new, (type(self), *self.args), state


def make_picklable(error: BaseException) -> BaseException:
    """Return the error if it can be pickled, else an :exc:`Exception` with its type and text."""
    if isinstance(error, EmitterError):
        return error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return Exception("".join(format_exception_only(error)).strip())
    return error


class ConnectError(EmitterError):
    """
    A failure to open a connection to any server.

    :ivar causes: the errors by server (a URL without user name and password)
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
    A connection refused by the broker in its CONNACK packet.

    :ivar code: the return code of the CONNACK packet, 1 to 5 in MQTT 3.1.1
    """

    def __init__(
        self, message: str, causes: Mapping[str, Exception] | None = None, *, code: int = 0
    ) -> None:
        super().__init__(message, causes)
        self.code = code


class ConnectionLostError(EmitterError, anyio.BrokenResourceError):
    """
    The loss of an established connection. Whether pending calls took effect is unknown.

    :ivar unread: the messages that had been received but not read when the client gave up
        reconnecting
    """

    def __init__(self, message: str, unread: list[EmitterMessage] | None = None) -> None:
        super().__init__(message)
        self.unread: list[EmitterMessage] = [] if unread is None else unread


class ClosedError(EmitterError, anyio.ClosedResourceError):
    """A use of the client before it was entered or after it was left."""


class WrongLoopError(EmitterError, RuntimeError):
    """
    A use of a client or stream outside the thread and event loop in which the client was entered.

    The call had no effect, and the client keeps running. To call it from other threads, use
    ``anyio.from_thread.run()`` or a blocking portal of its event loop.
    """


class RequestTimeoutError(EmitterError, TimeoutError):
    """A timeout of a reply by the broker. Whether the request took effect is unknown."""


class RemoteProtocolError(EmitterError):
    """A violation of MQTT 3.1.1, WebSocket or Emitter's protocol by the peer."""


class SlowConsumerError(EmitterError):
    """
    Messages that were dropped because a buffer was full.

    A stream raises it at the position of the dropped messages.

    :ivar dropped: the number of messages dropped at this position
    """

    def __init__(self, message: str, *, dropped: int) -> None:
        super().__init__(message)
        self.dropped = dropped


class SubscriptionConflictError(EmitterError):
    """A subscription that the broker cannot distinguish from another on the same connection."""


class HandlerError(EmitterError):
    """
    An exception in a handler registered with ``on()``; ``__cause__`` is that exception.

    :ivar event: the event that the handler received
    """

    def __init__(self, message: str, *, event: str) -> None:
        super().__init__(message)
        self.event = event


class ReplyError(EmitterError):
    """An exception in the handler of another client that served a ``request()``."""


class DecodeError(EmitterError, ValueError):
    """
    An exception in a function that decodes messages; ``__cause__`` is that exception.

    :ivar message: the message that could not be decoded
    """

    def __init__(self, text: str, *, message: EmitterMessage) -> None:
        super().__init__(text)
        self.message = message


def make_decode_error(where: str, message: EmitterMessage, cause: Exception) -> DecodeError:
    """
    Make the error for a message that could not be decoded.

    :param where: the name of the stream
    """
    reason = "" if may_contain_key(message) else f": {make_printable(str(cause))}"
    text = f"{where}: cannot decode {describe(message)}: {type(cause).__name__}{reason}"
    error = DecodeError(text, message=message)
    error.__cause__ = cause
    return error


class InvalidChannelError(EmitterError, ValueError):
    """A channel that the broker would not accept, or to which it would deliver nothing."""


class MessageTooLargeError(EmitterError, ValueError):
    """A packet larger than the broker accepts; sending it would make it close the connection."""


class RequestError(EmitterError):
    """
    A refusal by the broker.

    :ivar status: Emitter's status, as in HTTP; ``None`` if the broker sent no status
    :ivar message: the broker's message, on one line and truncated after 200 characters
    :ivar operation: the operation: ``"publish"``, ``"subscribe"``, ``"keygen"`` …
    :ivar channel: the channel, without its key, or ``None``
    :ivar hint: the likely reasons for this refusal, or ``None``
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
    """400: an invalid request."""


class UnauthorizedError(RequestError):
    """401: a key that does not permit this operation on this channel."""


class PaymentRequiredError(RequestError):
    """402: a request that the contract does not cover."""


class ForbiddenError(RequestError):
    """403: an operation that no key permits, such as publishing to a wildcard."""


class NotFoundError(RequestError):
    """404: an unknown request or contract."""


class ServerError(RequestError):
    """5xx: a failure of the broker."""


class HistoryIncompleteError(RequestError):
    """
    A period whose stored messages could not all be read.

    ``history()`` raises it at the position of these messages. Iteration can continue after it.

    :ivar since: the first second of the period
    :ivar until: the last second of the period
    """

    def __init__(self, reason: str, *, channel: str, since: datetime, until: datetime) -> None:
        super().__init__(
            None,
            f"stored messages from {since:%Y-%m-%dT%H:%M:%SZ} to {until:%Y-%m-%dT%H:%M:%SZ} could "
            f"not be read: {reason}; continue iterating to read the others",
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
    """Make the error for a status."""
    kind = RequestError
    if status is not None:
        kind = ServerError if 500 <= status < 600 else _BY_STATUS.get(status, RequestError)
    return kind(status, message, operation=operation, channel=channel, hint=hint)
