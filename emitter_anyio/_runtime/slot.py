"""The state of a client and its current connection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from enum import Enum
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias
from weakref import WeakSet

import anyio
from anyio.lowlevel import checkpoint

from emitter_anyio._backend import Owner
from emitter_anyio._net.connection import Connection
from emitter_anyio._net.options import Options
from emitter_anyio._protocol.session import Session
from emitter_anyio._values.errors import ClosedError, ConnectionLostError
from emitter_anyio._values.messages import EmitterMessage

State: TypeAlias = Literal["closed", "connecting", "connected", "closing"]
"""What :attr:`Emitter.state` returns."""


class ClientState(Enum):
    """The state of a client."""

    CLOSED = "closed"
    CONNECTING = "connecting"
    RESTORING = "restoring"
    CONNECTED = "connected"
    DRAINING = "draining"
    CLOSING = "closing"
    ENDING = "ending"


_PUBLIC_STATES: Final[Mapping[ClientState, State]] = {
    ClientState.CLOSED: "closed",
    ClientState.CONNECTING: "connecting",
    ClientState.RESTORING: "connecting",
    ClientState.CONNECTED: "connected",
    ClientState.DRAINING: "connecting",
    ClientState.CLOSING: "closing",
    ClientState.ENDING: "closing",
}


class Step(Enum):
    """An event that changes the state of a client."""

    ENTER = "the client is entered"
    OPEN = "a connection is open"
    RESTORE = "everything is restored on the connection"
    DRAIN = "reconnect() closes the connection"
    LOSE = "the connection is lost"
    LEAVE = "the client begins to leave"
    STOP = "the last connection has ended"
    END = "the client has ended"


TRANSITIONS: Final[Mapping[tuple[ClientState, Step], ClientState]] = {
    (ClientState.CLOSED, Step.ENTER): ClientState.CONNECTING,
    (ClientState.CONNECTING, Step.OPEN): ClientState.RESTORING,
    (ClientState.CONNECTING, Step.LEAVE): ClientState.CLOSING,
    (ClientState.CONNECTING, Step.STOP): ClientState.ENDING,
    (ClientState.CONNECTING, Step.END): ClientState.CLOSED,
    (ClientState.RESTORING, Step.RESTORE): ClientState.CONNECTED,
    (ClientState.RESTORING, Step.LOSE): ClientState.CONNECTING,
    (ClientState.RESTORING, Step.LEAVE): ClientState.CLOSING,
    (ClientState.RESTORING, Step.STOP): ClientState.ENDING,
    (ClientState.RESTORING, Step.END): ClientState.CLOSED,
    (ClientState.CONNECTED, Step.DRAIN): ClientState.DRAINING,
    (ClientState.CONNECTED, Step.LOSE): ClientState.CONNECTING,
    (ClientState.CONNECTED, Step.LEAVE): ClientState.CLOSING,
    (ClientState.CONNECTED, Step.STOP): ClientState.ENDING,
    (ClientState.CONNECTED, Step.END): ClientState.CLOSED,
    (ClientState.DRAINING, Step.LOSE): ClientState.CONNECTING,
    (ClientState.DRAINING, Step.LEAVE): ClientState.CLOSING,
    (ClientState.DRAINING, Step.STOP): ClientState.ENDING,
    (ClientState.DRAINING, Step.END): ClientState.CLOSED,
    (ClientState.CLOSING, Step.STOP): ClientState.ENDING,
    (ClientState.CLOSING, Step.END): ClientState.CLOSED,
    (ClientState.ENDING, Step.END): ClientState.CLOSED,
}
"""The new state for each state and step. A step that is not listed has no effect."""


class Permit:
    """
    The permission of a key function to use a connection that is being restored.

    Other calls wait until everything is restored, and restoring waits for the key function. Tasks
    that the function starts inherit the permission. It ends for all of them when the block is left.

    :param connection: the connection that is being restored
    """

    def __init__(self, connection: Connection) -> None:
        self.connection: Connection | None = connection

    def __enter__(self) -> Self:
        self._token = _PERMIT.set(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.connection = None
        _PERMIT.reset(self._token)


_PERMIT: ContextVar[Permit | None] = ContextVar("emitter_anyio permit", default=None)


class Slot:
    """
    The state of a client, its current connection, and the cause of its loss.

    Other objects read its attributes. Only its methods set them.

    :param options: the options of the client
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._changed: anyio.Event | None = None
        self._losses: WeakSet[ConnectionLostError] = WeakSet()
        self.owner = Owner()
        self.state = ClientState.CLOSED
        self.entered_before = False
        """Whether the client was ever entered."""
        self.started = False
        """Whether the client is entered and its first connection was opened."""
        self.start_failure: Exception | None = None
        """The error with which entering failed."""
        self.connection: Connection | None = None
        self.restored = False
        """Whether everything is restored on the connection, so that every call can use it."""
        self.direct_thread = 0
        """The thread whose publishes need no further checks; 0 while every publish needs them."""
        self.lost: str | None = None
        """The reason of the final loss of the connection; ``None`` before it."""
        self.last_error: Exception | None = None
        """The cause of the last lost connection or failed attempt to connect."""
        self.unread: list[EmitterMessage] = []
        """The messages that were received but not read before the final loss."""
        self.leaving = False
        self.deadline = math.inf
        """The time by which the client must be closed; infinity before it begins to leave."""

    @property
    def session(self) -> Session | None:
        """The session of the current connection, if there is one."""
        return None if self.connection is None else self.connection.session

    @property
    def public_state(self) -> State:
        """The state that :attr:`Emitter.state` returns."""
        return _PUBLIC_STATES[self.state]

    @property
    def has_connections(self) -> bool:
        """Whether there is a connection or the client still tries to open one."""
        return self.started and self.state not in (ClientState.ENDING, ClientState.CLOSED)

    # Changes

    def enter(self) -> None:
        """Note that the client is entered and connects for the first time."""
        self.entered_before, self.started = True, False
        self.start_failure = self.lost = None
        self.unread = []
        self.leaving, self.deadline = False, math.inf
        self._transition(Step.ENTER)

    def fail_to_start(self, error: Exception) -> None:
        """Note the error with which entering failed."""
        self.start_failure = error

    def open(self, connection: Connection) -> None:
        """Note a new connection."""
        self.connection, self.started = connection, True
        self._transition(Step.OPEN)

    def restore(self) -> None:
        """Note that everything is restored, so that every call can use the connection."""
        self.restored = True
        # Publishes that are traced must not bypass the hook.
        self.direct_thread = self.owner.thread if self._options.trace is None else 0
        self._transition(Step.RESTORE)
        self._notify()

    def drain(self) -> None:
        """Let new calls wait for the next connection, because the current one is to be closed."""
        self.direct_thread = 0
        self._transition(Step.DRAIN)

    def close(self) -> None:
        """Note that the connection has ended."""
        self.connection = None
        self.restored, self.direct_thread = False, 0
        self._notify()

    def lose(self, error: Exception, why: str | None) -> None:
        """
        Note that the connection was lost.

        :param why: the reason why the loss is final; ``None`` if the client reconnects
        """
        self.last_error = error
        self.lost = self.lost or why
        if why is None:
            _remove_tracebacks(error)
            self._transition(Step.LOSE)

    def fail_to_connect(self, error: Exception) -> None:
        """Note the error with which an attempt to connect failed."""
        _remove_tracebacks(error)
        self.last_error = error

    def give_up(self, why: str) -> None:
        """Note the reason why the loss of the connection is final."""
        self.lost = self.lost or why

    def leave(self) -> None:
        """Note that the client begins to leave, and set the deadline."""
        self._begin_leaving()
        self._transition(Step.LEAVE)

    def stop(self) -> None:
        """Note that the last connection has ended. Handlers might still run."""
        self._begin_leaving()
        self._transition(Step.STOP)

    def _begin_leaving(self) -> None:
        if not self.leaving:
            self.leaving = True
            self.deadline = anyio.current_time() + self._options.disconnect_timeout

    def end(self) -> None:
        """Note that the client has ended."""
        self._transition(Step.END)

    def finish(self) -> None:
        """Note that the block was left."""
        self.started = False
        self._transition(Step.END)

    def keep_unread(self, messages: list[EmitterMessage]) -> None:
        """Add messages to :attr:`ConnectionLostError.unread`, each of them once."""
        known = set(map(id, self.unread))
        self.unread += [message for message in messages if id(message) not in known]

    async def change(self) -> None:
        """Wait until the state or the connection changes."""
        if self._changed is None or not self._changed.statistics().tasks_waiting:
            # An event that no task awaits might belong to another event loop.
            self._changed = anyio.Event()
        await self._changed.wait()

    def _transition(self, step: Step) -> None:
        state = TRANSITIONS.get((self.state, step), self.state)
        if state is not self.state:
            self.state = state
            self._notify()

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    # Using the connection

    def permitted(self) -> Connection | None:
        """Return the connection that the calling key function may use during its restoration."""
        permit = _PERMIT.get()
        return None if permit is None else permit.connection

    def usable(self, connection: Connection | None, bound: Connection | None = None) -> bool:
        """
        Return whether the caller may use a connection now.

        :param connection: the connection
        :param bound: the connection that the caller restores, if any
        """
        return (
            connection is not None
            and connection is self.connection
            and not connection.leaving
            and (
                (self.restored and self.state is not ClientState.DRAINING)
                or connection is (bound or self.permitted())
            )
        )

    @property
    def may_connect(self) -> bool:
        """Whether a caller that waits might get a connection."""
        if self.state is ClientState.CLOSING:
            return self.connection is not None and not self.restored
        return self.public_state == "connecting" and self.started

    async def connected(
        self, bound: Connection | None = None, *, has_waited: bool = False
    ) -> Connection:
        """
        Wait until the caller may use a connection.

        :param bound: as for :meth:`usable`
        :param has_waited: whether the calling method has let other tasks run
        :return: the connection
        :raises ClosedError: if the client is closed or was never entered
        :raises ConnectionLostError: after the final loss, or with ``while_down="raise"`` while the
            client reconnects
        """
        self.owner.check()
        while not self.usable(self.connection, bound):
            error = self._unavailable()
            if error is not None:
                if not has_waited:
                    # Otherwise, a loop that catches the error could neither be cancelled nor let
                    # the client reconnect.
                    await checkpoint()
                raise error
            await self.change()
            has_waited = True
        assert self.connection is not None
        return self.connection

    async def reconnected(self) -> None:
        """
        Wait for the next connection, whatever ``while_down`` is.

        :raises ClosedError: if the client is closed
        :raises ConnectionLostError: after the final loss
        """
        while not self.usable(self.connection):
            if not self.may_connect:
                raise self.gone()
            await self.change()

    # Errors

    def _unavailable(self) -> Exception | None:
        """Return the error for a call that must not wait for a connection, or ``None``."""
        if not self.may_connect:
            return self.gone()
        if self._options.while_down == "raise":
            return ConnectionLostError(
                "not connected: the client is reconnecting, and while_down is 'raise'"
            )
        return None

    def gone(self) -> Exception:
        """Return the error for a call that finds no connection."""
        if self.lost is not None:
            return self.connection_lost()
        if not self.entered_before:
            return ClosedError(
                "the client is not entered: use it inside 'async with connect(…) as emitter:' or "
                "start run() first"
            )
        error = ClosedError("the client is closed: it has disconnected or could not connect")
        error.__cause__ = self.start_failure
        return error

    def connection_lost(self) -> ConnectionLostError:
        """Return the error of the final loss."""
        error = ConnectionLostError(self.lost or "the connection was lost", self.unread)
        error.__cause__ = self.last_error
        self._losses.add(error)
        return error

    def is_loss(self, error: BaseException) -> bool:
        """Return whether an error is one of the final loss, or a group of only such errors."""
        if isinstance(error, BaseExceptionGroup):
            return all(map(self.is_loss, error.exceptions))
        return error in self._losses

    def is_transient(self, error: BaseException) -> bool:
        """Return whether an error is due to a lost connection that the client replaces."""
        if isinstance(error, ExceptionGroup):
            return all(map(self.is_transient, error.exceptions))
        transient = isinstance(error, ConnectionLostError) and self._options.reconnect is not None
        return transient and self.lost is None


def _remove_tracebacks(error: BaseException | None) -> None:
    """
    Remove the tracebacks of an error and its causes.

    ``last_error`` is kept until the next loss, and the frames of a traceback would keep the old
    connection, which takes as much memory as the new one.
    """
    while error is not None and error.__traceback__ is not None:
        error.with_traceback(None)
        for cause in getattr(error, "causes", {}).values():
            _remove_tracebacks(cause)
        error = error.__cause__ or error.__context__
