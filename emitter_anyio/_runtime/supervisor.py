"""Running connections, reconnecting, and restoring what the client had."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeAlias

import anyio

from emitter_anyio._backend.tasks import sleep
from emitter_anyio._net.connection import Connection
from emitter_anyio._net.opening import is_permanent
from emitter_anyio._net.options import Options
from emitter_anyio._protocol.session import Session
from emitter_anyio._protocol.wants import Wants
from emitter_anyio._values.errors import (
    ClosedError,
    ConnectError,
    ConnectionLostError,
    RequestTimeoutError,
)
from emitter_anyio._values.text import format_count

from .background import Background
from .dispatcher import Dispatcher
from .events import Events, logger
from .holds import Holds
from .opener import Opener
from .requester import Requester
from .slot import ClientState, Slot
from .totals import Totals


@dataclass(frozen=True, slots=True)
class Restoration:
    """
    A request that restores something on a new connection, and has been sent.

    :ivar what: a description for log lines
    :ivar answered: awaits the broker's reply
    :ivar refused: called with the error if the broker refuses
    """

    what: str
    # Not shown in the repr, because both might hold a key.
    answered: Callable[[], Awaitable[None]] = field(repr=False)
    refused: Callable[[Exception], None] = field(repr=False)


class Restoring:
    """
    The means by which a feature restores its part of a connection.

    :param connection: the connection
    :param requester: sends requests on the connection before other calls can use it
    :param start_soon: starts a task that ends with the connection
    """

    def __init__(
        self,
        connection: Connection,
        requester: Requester,
        start_soon: Callable[..., None],
    ) -> None:
        self.connection = connection
        self.requester = requester
        self.start_soon = start_soon


class _ConnectionTasks:
    """
    The tasks that restore a connection, which end with it.

    :param background: runs the tasks
    """

    def __init__(self, background: Background) -> None:
        self._background = background
        self._scopes: list[anyio.CancelScope] = []
        self._ended = False

    def start_soon(
        self, function: Callable[..., Coroutine[Any, Any, None]], *arguments: object
    ) -> None:
        """Start a task, unless the connection has ended."""
        # A task that got its reply just before the end might still start a task.
        if not self._ended:
            self._scopes.append(self._background.start_soon(function, *arguments))

    def end(self) -> None:
        """Cancel the tasks."""
        self._ended = True
        for scope in self._scopes:
            scope.cancel()


Restorer: TypeAlias = Callable[[Restoring], Iterable[Restoration]]
"""A function that sends the requests of a feature on a new connection."""

Settler: TypeAlias = Callable[[], Awaitable[None]]
"""A function that waits until the pending calls of a feature have completed."""

LossHandler: TypeAlias = Callable[[], None]
"""A function that is called after the loss of a connection that might have lost messages."""

_LATE_EVENTS: Final = ("disconnect", "error")
"""The events that are emitted even after the connection is closed."""

_INTERRUPTIONS: Final = (ClosedError, ConnectionLostError, RequestTimeoutError)
"""Errors of a restoration that mean that the connection is unusable."""

_GOOD_SECONDS: Final = 10.0
"""
The age in seconds from which the loss of a connection restarts the back-off.

A broker that accepts connections and soon closes them must not be contacted without a pause.
"""


class Supervisor:
    """
    Runs the connections of a client, one after another.

    :param slot: the state of the client
    :param background: runs tasks
    :param opener: opens connections
    :param dispatcher: delivers what the connections receive
    :param requester: sends requests
    :param events: emits ``connect`` and ``disconnect``
    :param totals: counts connections and publishes
    :param wants: the subscriptions and presence feeds of the client
    :param holds: delays the orderly close of the last connection
    :param options: the options of the client
    :param restorers: called in this order to restore a new connection
    :param settlers: awaited in this order before a connection is replaced
    :param loss_handlers: called in this order after the loss of a connection
    """

    def __init__(
        self,
        slot: Slot,
        background: Background,
        opener: Opener,
        dispatcher: Dispatcher,
        requester: Requester,
        events: Events,
        totals: Totals,
        wants: Wants,
        holds: Holds,
        options: Options,
        *,
        restorers: Sequence[Restorer],
        settlers: Sequence[Settler],
        loss_handlers: Sequence[LossHandler],
    ) -> None:
        self._slot = slot
        self._background = background
        self._opener = opener
        self._dispatcher = dispatcher
        self._requester = requester
        self._events = events
        self._totals = totals
        self._wants = wants
        self._holds = holds
        self._options = options
        self._restorers = restorers
        self._settlers = settlers
        self._loss_handlers = loss_handlers
        self._first: Connection | None = None
        """The first connection, until :meth:`run` takes it."""
        self._good_at = math.inf
        """The time from which the loss of the current connection restarts the back-off."""
        self._carried: list[bytes] = []
        """Encoded QoS 0 publishes that wait for the next connection; no byte of them was sent."""
        self._retrying: anyio.CancelScope | None = None
        """The scope of the last period of reconnecting."""
        self._replaced: Exception | None = None
        """The reason for the end of a connection that :meth:`replace` closes."""
        self._received = 0
        """The number of messages received when the last connection ended."""

    # All connections

    async def open_first(self) -> Connection:
        """
        Open the first connection.

        :return: the connection
        :raises ConnectError: if no server could be reached; with ``retry_first_connect``, only if
            all tries of the back-off have failed
        """
        self._carried = []
        backoff = self._options.reconnect
        if backoff is None or not self._options.retry_first_connect:
            return await self._opener.open(None, self._background.tasks)
        attempt = 0
        warned: set[str] = set()
        while True:
            attempt += 1
            try:
                return await self._opener.open(None, self._background.tasks)
            except ConnectError as exc:
                self._slot.fail_to_connect(exc)
                if attempt == backoff.tries:
                    raise
                # The caller sees nothing else of the first failure.
                level = logging.WARNING if attempt == 1 else logging.INFO
                _log_failed_try("connect", attempt, exc, warned, level)
            await anyio.sleep(backoff.delay(attempt - 1))

    def begin(self, connection: Connection) -> None:
        """Make the first connection available to all calls. There is nothing to restore."""
        self._first = connection
        self._slot.open(connection)
        logger.info("connected to %s", connection.server)
        self._make_available(connection)

    async def run(self) -> None:
        """Run the first connection, and reconnect until the client ends or gives up."""
        attempt = 0
        # An argument of this function would keep the first connection until the client ends.
        connection, self._first = self._first, None
        while connection is not None:
            broken = await self._run_one(connection)
            if connection.timer.clock() > self._good_at:
                attempt = 0
            self._good_at = math.inf
            connection, attempt = await self._next(connection, broken, attempt)

    async def abandon(self) -> None:
        """Close the first connection instead of running it."""
        assert self._first is not None
        await self._first.abandon()
        self._first = None

    def replace(self, connection: Connection) -> None:
        """Start to close the connection in an orderly way, and reconnect after that."""
        self._replaced = ConnectionLostError("reconnect() was called")
        # This end is not a failure, so it restarts the back-off.
        self._good_at = -math.inf
        self._slot.drain()
        self._background.start_soon(self._drain, connection)

    def leave(self) -> None:
        """Start to close the connection in an orderly way, or stop reconnecting."""
        if self._slot.connection is not None:
            self._start_closing(self._slot.connection)
        else:
            # Until the deadline, a new connection can still send the queued publishes.
            self._stop_retrying(self._slot.deadline if self._carried else -math.inf)

    def cut_off(self) -> None:
        """End the connection or stop reconnecting immediately."""
        if (connection := self._slot.connection) is not None:
            self._end(connection, None)
            connection.close()
        self._stop_retrying(-math.inf)

    def _stop_retrying(self, deadline: float) -> None:
        if self._retrying is not None:
            self._retrying.deadline = deadline

    def finish(self) -> None:
        """Record the end of the connection, if cancellation has prevented that."""
        if self._slot.connection is not None:
            self._end(self._slot.connection, None)

    def give_up_carried(self) -> int:
        """Discard the publishes that wait for a connection; return their number."""
        unsent, self._carried = len(self._carried), []
        self._totals.give_up(unsent)
        return unsent

    # One connection

    async def _run_one(self, connection: Connection) -> Exception | None:
        tasks = _ConnectionTasks(self._background)
        if not self._slot.restored and connection is self._slot.connection:
            self._restore(connection, tasks)
            if self._slot.leaving:
                self._start_closing(connection)
        broken = await connection.run(
            self._dispatcher.deliver_for(connection), self._background.tasks
        )
        if broken is None and self._slot.state is ClientState.DRAINING:
            broken = self._replaced
        # No await before this: callers that run() has woken must find that the connection ended.
        self._end(connection, broken)
        tasks.end()
        return broken

    def _restore(self, connection: Connection, tasks: _ConnectionTasks) -> None:
        """Send all requests that restore a connection, and start tasks that await the replies."""
        # Send all requests without awaiting in between. A subscription that a user leaves is then
        # either not requested on this connection, or unsubscribed after it was requested.
        restoring = Restoring(connection, self._requester.bind(connection), tasks.start_soon)
        restorations = [each for restorer in self._restorers for each in restorer(restoring)]
        unanswered = set(map(id, restorations))
        for each in restorations:
            tasks.start_soon(self._await_restored, connection, each, unanswered, len(restorations))
        if not restorations:
            self._complete_restoring(connection, 0)

    async def _await_restored(
        self, connection: Connection, restoration: Restoration, unanswered: set[int], count: int
    ) -> None:
        try:
            await restoration.answered()
        except _INTERRUPTIONS as exc:
            connection.fail(exc)
        except Exception as exc:
            logger.warning("could not restore %s: %s", restoration.what, exc)
            restoration.refused(exc)
        unanswered.discard(id(restoration))
        if not (unanswered or connection.broken) and connection is self._slot.connection:
            self._complete_restoring(connection, count)

    def _complete_restoring(self, connection: Connection, count: int) -> None:
        carried, self._carried = self._carried, []
        connection.session.publish_encoded(carried)
        logger.info(
            "reconnected to %s (restored subscriptions, feeds and links: %d)",
            connection.server,
            count,
        )
        self._make_available(connection)

    def _make_available(self, connection: Connection) -> None:
        self._good_at = connection.timer.clock() + _GOOD_SECONDS
        self._totals.open_connection()
        self._slot.restore()
        self._events.emit("connect")

    def _end(self, connection: Connection, broken: Exception | None) -> None:
        """Record the end of a connection, and keep its unsent publishes for the next one."""
        slot = self._slot
        if connection is not slot.connection:
            return
        was_restored = slot.restored
        slot.close()
        session = connection.session
        self._totals.end_connection(session.nonsense)
        # The connection's own unsent publishes are older than those that waited for restoring.
        unsent = connection.unsent
        self._carried = [*unsent, *self._carried]
        gone: Callable[[], Exception] = slot.gone
        if broken is None:
            logger.info("disconnected from %s", connection.server)
        else:
            lost = _lost(connection)
            level = logging.INFO if broken is self._replaced else logging.WARNING
            logger.log(level, "%s: %s", lost, broken)
            if self._options.reconnect is None:
                slot.lose(broken, f"{lost}: {broken}")
            else:
                slot.lose(broken, None)
                gone = partial(_interrupted, connection, broken)
        self._wants.keep_accepted()
        uncertain = session.lost(gone) - len(unsent)
        if uncertain and not connection.read_by_broker:
            self._totals.doubt(uncertain)
            logger.warning(
                "%s of qos=0 might not have reached the broker: the connection ended while "
                "they were being sent",
                format_count(uncertain, "publish", "publishes"),
            )
        if was_restored or self._totals.received > self._received:
            # A connection that delivered messages before it was restored might have lost others.
            for handle_loss in self._loss_handlers:
                handle_loss()
        self._received = self._totals.received
        if was_restored:
            self._events.emit("disconnect")

    # Closing

    def _start_closing(self, connection: Connection) -> None:
        self._background.start_soon(self.close, connection)

    async def close(self, connection: Connection) -> None:
        """Wait for handlers and replies, then disconnect, all before the deadline."""
        session = connection.session
        idle = self._slot.restored and not (
            self._events.busy or self._holds.held or session.pending or session.uncertain
        )
        if not (idle and connection.disconnect_nowait()):
            with anyio.CancelScope(deadline=self._slot.deadline):
                await self._wait_and_disconnect(connection)
        connection.close()

    async def _wait_and_disconnect(self, connection: Connection) -> None:
        slot, events, session = self._slot, self._events, connection.session
        while slot.connection is connection and not slot.restored:
            await slot.change()
        events.end(but=_LATE_EVENTS)
        await events.wait_done(slot.deadline, but=_LATE_EVENTS)
        await self._holds.wait_released()
        await _wait_replies(session)
        await connection.disconnect(await_close=session.uncertain)

    async def _drain(self, connection: Connection) -> None:
        """Wait for replies, then disconnect, within ``disconnect_timeout``."""
        with anyio.move_on_after(self._options.disconnect_timeout):
            await _wait_replies(connection.session)
            for settle in self._settlers:
                await settle()
            await connection.disconnect(await_close=True, discard=False)
        connection.close()

    # The next connection

    async def _next(
        self, last: Connection, broken: Exception | None, attempt: int
    ) -> tuple[Connection | None, int]:
        slot, backoff = self._slot, self._options.reconnect
        if broken is None or backoff is None or (slot.leaving and not self._carried):
            return None, attempt
        deadline = slot.deadline if slot.leaving else math.inf
        warned: set[str] = set()
        with anyio.CancelScope(deadline=deadline) as self._retrying:
            while backoff.tries is None or attempt < backoff.tries:
                if not await sleep(backoff.delay(attempt)):
                    break
                attempt += 1
                try:
                    connection = await self._opener.open(last, self._background.tasks)
                except ConnectError as exc:
                    slot.fail_to_connect(exc)
                    _log_failed_try("reconnect", attempt, exc, warned, logging.INFO)
                    continue
                slot.open(connection)
                return connection, attempt
            else:
                if not slot.leaving:
                    tries = format_count(attempt, "try", "tries")
                    why = f"{_lost(last)} and could not reconnect in {tries}: {slot.last_error}"
                    slot.give_up(why)
                    logger.error("%s", why)
        return None, attempt


async def _wait_replies(session: Session) -> None:
    """Wait for the replies that callers await now."""
    for pending in session.awaited():
        done = anyio.Event()
        pending.call_when_done(done.set)
        await done.wait()


def _lost(connection: Connection) -> str:
    return f"lost the connection to {connection.server}"


def _interrupted(connection: Connection, broken: Exception) -> ConnectionLostError:
    error = ConnectionLostError(
        f"lost the connection to {connection.server} before the reply: {broken}; whether the call "
        "took effect is unknown"
    )
    error.__cause__ = broken
    return error


def _log_failed_try(
    verb: str, attempt: int, error: ConnectError, warned: set[str], level: int
) -> None:
    """
    Log a failed try: once as a warning for each distinct permanent cause, otherwise as info.

    :param warned: the permanent causes that were logged as warnings by earlier tries
    :param level: the level without such a cause
    """
    for server, cause in error.causes.items():
        text = f"{server}: {cause}"
        if is_permanent(cause) and text not in warned:
            warned.add(text)
            level = logging.WARNING
    logger.log(level, "try %d to %s failed: %s", attempt, verb, error)
