"""The client's state, and the connection that it has now."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from enum import Enum
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias
from weakref import WeakSet

import anyio

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
    CLOSING = "closing"
    ENDING = "ending"


_PUBLIC_STATES: Final[Mapping[ClientState, State]] = {
    ClientState.CLOSED: "closed",
    ClientState.CONNECTING: "connecting",
    ClientState.RESTORING: "connecting",
    ClientState.CONNECTED: "connected",
    ClientState.CLOSING: "closing",
    ClientState.ENDING: "closing",
}


class Step(Enum):
    """What changes the state of a client."""

    ENTER = "the client is entered"
    OPEN = "a connection is open"
    RESTORE = "everything is restored on it"
    LOSE = "the connection is lost"
    LEAVE = "the client begins to leave"
    STOP = "there is no connection and will be none"
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
    (ClientState.CONNECTED, Step.LOSE): ClientState.CONNECTING,
    (ClientState.CONNECTED, Step.LEAVE): ClientState.CLOSING,
    (ClientState.CONNECTED, Step.STOP): ClientState.ENDING,
    (ClientState.CONNECTED, Step.END): ClientState.CLOSED,
    (ClientState.CLOSING, Step.STOP): ClientState.ENDING,
    (ClientState.CLOSING, Step.END): ClientState.CLOSED,
    (ClientState.ENDING, Step.END): ClientState.CLOSED,
}
"""A step that is not listed for a state does not change it."""


class Permit:
    """
    The right of a key function to use a connection that is being restored.

    Other calls wait until everything is restored, which would wait for the function. The tasks that
    it starts have the right as well, and all lose it when the block is left.

    :param connection: the connection
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
    The place of the present connection, and why there is none.

    Its attributes are read by others and set only here.

    :param options: the client's options
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._changed: anyio.Event | None = None
        self._losses: WeakSet[ConnectionLostError] = WeakSet()
        self.owner = Owner()
        self.state = ClientState.CLOSED
        self.entered_before = False
        """Whether the client has ever been entered."""
        self.started = False
        """Whether the client is entered and has had a connection."""
        self.start_failure: Exception | None = None
        """Why the client could not be started."""
        self.connection: Connection | None = None
        self.restored = False
        """Whether every call may use the connection."""
        self.direct_thread = 0
        """The thread whose calls may use the connection without further checks, or 0."""
        self.lost: str | None = None
        """Why there will be no connection any more."""
        self.last_error: Exception | None = None
        """Why the last connection was lost, or the last attempt to connect failed."""
        self.unread: list[EmitterMessage] = []
        """The messages that were received, but not read before the final loss."""
        self.leaving = False
        self.deadline = math.inf
        """The time at which leaving must be complete."""

    @property
    def session(self) -> Session | None:
        """The conversation on the present connection."""
        return None if self.connection is None else self.connection.session

    @property
    def public_state(self) -> State:
        """The state as users see it, for whom restoring is a part of connecting."""
        return _PUBLIC_STATES[self.state]

    @property
    def has_connections(self) -> bool:
        """Whether there is a connection, or might be another one."""
        return self.started and self.state not in (ClientState.ENDING, ClientState.CLOSED)

    # Changes

    def enter(self) -> None:
        """Begin to connect for the first time."""
        self.entered_before, self.started = True, False
        self.start_failure = self.lost = None
        self.unread = []
        self.leaving, self.deadline = False, math.inf
        self._take(Step.ENTER)

    def fail_to_start(self, error: Exception) -> None:
        """Note why the client could not be started."""
        self.start_failure = error

    def open(self, connection: Connection) -> None:
        """Note a new connection."""
        self.connection, self.started = connection, True
        self._take(Step.OPEN)

    def restore(self) -> None:
        """Let every call use the connection."""
        self.restored = True
        # A traced publish takes the way with the hook.
        self.direct_thread = self.owner.thread if self._options.trace is None else 0
        self._take(Step.RESTORE)
        self._tell()

    def close(self) -> None:
        """Note that the connection has ended."""
        self.connection = None
        self.restored, self.direct_thread = False, 0
        self._tell()

    def lose(self, error: Exception, why: str | None) -> None:
        """
        Note that the connection was lost.

        :param why: why there will be no other one, or ``None``
        """
        self.last_error = error
        self.lost = self.lost or why
        if why is None:
            self._take(Step.LOSE)

    def fail_to_connect(self, error: Exception) -> None:
        """Note why an attempt to connect again has failed."""
        self.last_error = error

    def give_up(self, why: str) -> None:
        """Note that there will be no other connection."""
        self.lost = self.lost or why

    def leave(self) -> None:
        """Begin to leave."""
        self._begin_leaving()
        self._take(Step.LEAVE)

    def stop(self) -> None:
        """Note that there is no connection and will be none; handlers might still run."""
        self._begin_leaving()
        self._take(Step.STOP)

    def _begin_leaving(self) -> None:
        if not self.leaving:
            self.leaving = True
            self.deadline = anyio.current_time() + self._options.disconnect_timeout

    def end(self) -> None:
        """Note that the client has ended."""
        self._take(Step.END)

    def finish(self) -> None:
        """Note that the client is left."""
        self.started = False
        self._take(Step.END)

    def keep_unread(self, messages: list[EmitterMessage]) -> None:
        """Keep messages for :attr:`ConnectionLostError.unread`."""
        known = set(map(id, self.unread))
        self.unread += [message for message in messages if id(message) not in known]

    async def change(self) -> None:
        """Wait until the state or the connection changes."""
        if self._changed is None or not self._changed.statistics().tasks_waiting:
            # An event without waiters might belong to an earlier event loop.
            self._changed = anyio.Event()
        await self._changed.wait()

    def _take(self, step: Step) -> None:
        state = TRANSITIONS.get((self.state, step), self.state)
        if state is not self.state:
            self.state = state
            self._tell()

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    # Using the connection

    def permitted(self) -> Connection | None:
        """Return the connection that the calling key function may use before it is restored."""
        permit = _PERMIT.get()
        return None if permit is None else permit.connection

    def usable(self, connection: Connection | None, bound: Connection | None = None) -> bool:
        """
        Return whether the calling code may use a connection.

        :param bound: the connection that the calling code restores, if any
        """
        return (
            connection is not None
            and connection is self.connection
            and not connection.leaving
            and (self.restored or connection is (bound or self.permitted()))
        )

    @property
    def may_connect(self) -> bool:
        """Whether there may be a connection to use later."""
        if self.state is ClientState.CLOSING:
            return self.connection is not None and not self.restored
        return self.state in (ClientState.CONNECTING, ClientState.RESTORING) and self.started

    async def connected(self, bound: Connection | None = None) -> Connection:
        """
        Wait for a connection to use.

        :param bound: as for :meth:`usable`
        :raises ClosedError: if there will be none
        :raises ConnectionLostError: likewise, after the final loss; or with
            ``while_down="raise"``, if there is none now
        """
        self.owner.check()
        while not self.usable(self.connection, bound):
            if not self.may_connect:
                raise self.gone()
            if self._options.while_down == "raise":
                raise ConnectionLostError("the link is away, and another one is being opened")
            await self.change()
        assert self.connection is not None
        return self.connection

    # Why there is none

    def gone(self) -> Exception:
        """Make the error of a call that finds no connection."""
        if self.lost is not None:
            return self.connection_lost()
        if not self.entered_before:
            return ClosedError(
                "the client is not entered: use it inside 'async with connect(…) as emitter:', "
                "or start its run() first"
            )
        error = ClosedError("the client is closed: it has disconnected, or was never connected")
        error.__cause__ = self.start_failure
        return error

    def connection_lost(self) -> ConnectionLostError:
        """Make the error of the final loss."""
        error = ConnectionLostError(self.lost or "the link is lost", self.unread)
        error.__cause__ = self.last_error
        self._losses.add(error)
        return error

    def is_loss(self, error: BaseException) -> bool:
        """Return whether an error is about the final loss, or a group of only such errors."""
        if isinstance(error, BaseExceptionGroup):
            return all(map(self.is_loss, error.exceptions))
        return error in self._losses

    def will_pass(self, error: BaseException) -> bool:
        """Return whether an error is about a lost connection that will be replaced."""
        if isinstance(error, ExceptionGroup):
            return all(map(self.will_pass, error.exceptions))
        transient = isinstance(error, ConnectionLostError) and self._options.reconnect is not None
        return transient and self.lost is None
