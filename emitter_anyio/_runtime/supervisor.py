"""One connection after another, each restored before it is used."""

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
from emitter_anyio._protocol.wants import Wants
from emitter_anyio._values.errors import (
    ClosedError,
    ConnectError,
    ConnectionLostError,
    RequestTimeoutError,
)

from .background import Background
from .dispatcher import Dispatcher
from .events import Events, logger
from .opener import Opener
from .requester import Requester
from .slot import Slot
from .totals import Totals


@dataclass(frozen=True, slots=True)
class Restoration:
    """
    Something that a new connection must have, and for which the broker is being asked.

    :ivar what: what it is, for log lines
    :ivar answered: awaits the broker's reply
    :ivar refused: gets the error if it cannot be restored
    """

    what: str
    # Neither is shown, because both may hold a key.
    answered: Callable[[], Awaitable[None]] = field(repr=False)
    refused: Callable[[Exception], None] = field(repr=False)


class Restoring:
    """
    What the features get to restore a connection.

    :param connection: the connection
    :param requester: sends requests on the connection before other calls may use it
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


Restorer: TypeAlias = Callable[[Restoring], Iterable[Restoration]]
"""Asks for what a feature needs on a new connection."""

Loser: TypeAlias = Callable[[], None]
"""Learns that a connection was lost on which messages might have been missed."""

_AFTER_THE_CONNECTION: Final = ("disconnect", "error")
"""Events that are still emitted after the connection is closed."""

_INTERRUPTIONS: Final = (ClosedError, ConnectionLostError, RequestTimeoutError)
"""Errors of a restoration that are about the connection, not about what is restored."""

_GOOD_SECONDS: Final = 10.0
"""
The age at which the loss of a connection restarts the back-off.

A broker that accepts connections and soon closes them must not be contacted without pause.
"""


class Supervisor:
    """
    Runs the client's connections.

    :param slot: the present connection
    :param background: runs tasks
    :param opener: opens connections
    :param dispatcher: delivers what they receive
    :param requester: sends requests
    :param events: emits ``connect`` and ``disconnect``
    :param totals: counts
    :param wants: what the client wants from every connection
    :param options: the client's options
    :param restorers: what the features restore, in order
    :param losers: what the features do when a connection is lost, in order
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
        options: Options,
        *,
        restorers: Sequence[Restorer],
        losers: Sequence[Loser],
    ) -> None:
        self._slot = slot
        self._background = background
        self._opener = opener
        self._dispatcher = dispatcher
        self._requester = requester
        self._events = events
        self._totals = totals
        self._wants = wants
        self._options = options
        self._restorers = restorers
        self._losers = losers
        self._good_at = math.inf
        """The time at which the connection will have been good for long enough."""
        self._carried: list[bytes] = []
        """Encoded QoS 0 publishes of which no connection has sent a byte."""
        self._retrying: anyio.CancelScope | None = None
        self._received = 0
        """The number of messages received when the last connection ended."""

    # From the first connection to the last one

    async def open_first(self) -> Connection:
        """
        Open the first connection.

        :raises ConnectError: if no server could be reached
        """
        self._carried = []
        return await self._opener.open(None, self._background.tasks)

    def begin(self, connection: Connection) -> None:
        """Let every call use the first connection, for which there is nothing to restore."""
        self._slot.open(connection)
        logger.info("connected to %s", connection.server)
        self._be_restored(connection)

    async def run(self, first: Connection) -> None:
        """Run connections until there is no other one."""
        attempt = 0
        connection: Connection | None = first
        while connection is not None:
            broken = await self._run_one(connection)
            if connection.timer.clock() > self._good_at:
                attempt = 0
            self._good_at = math.inf
            connection, attempt = await self._next(connection, broken, attempt)

    def leave(self) -> None:
        """Close the connection in an orderly way, or stop trying to open one."""
        if self._slot.connection is not None:
            self._start_closing(self._slot.connection)
        elif self._retrying is not None:
            # Queued publishes may still find a connection before the deadline.
            if self._carried:
                self._retrying.deadline = self._slot.deadline
            else:
                self._retrying.cancel()

    def cut_off(self) -> None:
        """End the connection, or the attempts to open one, now."""
        if (connection := self._slot.connection) is not None:
            self._end(connection, None)
            connection.close()
        if self._retrying is not None:
            self._retrying.cancel()

    def finish(self) -> None:
        """End what cancellation has kept from ending in its own time."""
        if self._slot.connection is not None:
            self._end(self._slot.connection, None)
        self._retrying = None

    def give_up_carried(self) -> int:
        """Give up the publishes that wait for a connection; return their number."""
        unsent, self._carried = len(self._carried), []
        self._totals.give_up(unsent)
        return unsent

    # One connection

    async def _run_one(self, connection: Connection) -> Exception | None:
        scopes: list[anyio.CancelScope] = []
        if not self._slot.restored and connection is self._slot.connection:
            self._restore(connection, scopes)
            if self._slot.leaving:
                self._start_closing(connection)
        broken = await connection.run(
            self._dispatcher.deliver_for(connection), self._background.tasks
        )
        # In the turn in which a connection ends, so that callers it lets go find none.
        self._end(connection, broken)
        for scope in scopes:
            scope.cancel()
        return broken

    def _restore(self, connection: Connection, scopes: list[anyio.CancelScope]) -> None:
        """
        Start to restore a connection.

        :param scopes: receives the scopes of the tasks that end with the connection
        """

        def start_soon(
            function: Callable[..., Coroutine[Any, Any, None]], *arguments: object
        ) -> None:
            scopes.append(self._background.start_soon(function, *arguments))

        # Everything is asked before anything is awaited: what a user gives up meanwhile either is
        # not asked for on this connection, or is taken back after it was asked for.
        restoring = Restoring(connection, self._requester.bind(connection), start_soon)
        asked = [one for restorer in self._restorers for one in restorer(restoring)]
        unanswered = set(map(id, asked))
        for one in asked:
            start_soon(self._await_restored, connection, one, unanswered, len(asked))
        if not asked:
            self._be_restored_again(connection, 0)

    async def _await_restored(
        self, connection: Connection, one: Restoration, unanswered: set[int], count: int
    ) -> None:
        try:
            await one.answered()
        except _INTERRUPTIONS as exc:
            connection.fail(exc)
        except Exception as exc:
            logger.warning("%s could not be restored: %s", one.what, exc)
            one.refused(exc)
        unanswered.discard(id(one))
        if not (unanswered or connection.broken) and connection is self._slot.connection:
            self._be_restored_again(connection, count)

    def _be_restored_again(self, connection: Connection, count: int) -> None:
        carried, self._carried = self._carried, []
        connection.session.publish_encoded(carried)
        logger.info("connected again to %s, with %d things restored", connection.server, count)
        self._be_restored(connection)

    def _be_restored(self, connection: Connection) -> None:
        self._good_at = connection.timer.clock() + _GOOD_SECONDS
        self._totals.open_connection()
        self._slot.restore()
        self._events.emit("connect")

    def _end(self, connection: Connection, broken: Exception | None) -> None:
        """Note that a connection has ended; keep what may go on for the next one."""
        slot = self._slot
        if connection is not slot.connection:
            return
        was_restored = slot.restored
        slot.close()
        session = connection.session
        self._totals.end_connection(session.nonsense)
        # What had to wait for the restoration follows what this connection has not sent.
        unsent = connection.unsent
        self._carried = [*unsent, *self._carried]
        gone: Callable[[], Exception] = slot.gone
        if broken is None:
            logger.info("disconnected from %s", connection.server)
        else:
            lost = _lost(connection)
            logger.warning("%s: %s", lost, broken)
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
                "%d publishes of qos=0 were under way: the broker may have taken them or not",
                uncertain,
            )
        if was_restored or self._totals.received > self._received:
            # If a connection has delivered messages before it was restored, others may be missing.
            for lost_by in self._losers:
                lost_by()
        self._received = self._totals.received
        if was_restored:
            self._events.emit("disconnect")

    # Closing

    def _start_closing(self, connection: Connection) -> None:
        self._background.start_soon(self.close, connection)

    async def close(self, connection: Connection) -> None:
        """Close a connection in an orderly way, before the deadline."""
        session = connection.session
        quiet = self._slot.restored and not (
            self._events.busy or session.pending or session.uncertain
        )
        if not (quiet and connection.disconnect_nowait()):
            with anyio.CancelScope(deadline=self._slot.deadline):
                await self._wait_and_disconnect(connection)
        connection.close()

    async def _wait_and_disconnect(self, connection: Connection) -> None:
        slot, events, session = self._slot, self._events, connection.session
        while slot.connection is connection and not slot.restored:
            await slot.change()
        events.end(but=_AFTER_THE_CONNECTION)
        await events.wait_done(slot.deadline, but=_AFTER_THE_CONNECTION)
        for pending in session.awaited():
            done = anyio.Event()
            pending.call_when_done(done.set)
            await done.wait()
        await connection.disconnect(await_close=session.uncertain)

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
            delay = backoff.spread_delay()
            while backoff.tries is None or attempt < backoff.tries:
                if not await sleep(delay + backoff.delay(attempt)):
                    break
                delay = 0
                attempt += 1
                try:
                    connection = await self._opener.open(last, self._background.tasks)
                except ConnectError as exc:
                    slot.fail_to_connect(exc)
                    _log_failed_try(attempt, exc, warned)
                    continue
                slot.open(connection)
                self._retrying = None
                return connection, attempt
            else:
                if not slot.leaving:
                    why = (
                        f"{_lost(last)}, and {attempt} tries have opened no other: "
                        f"{slot.last_error}"
                    )
                    slot.give_up(why)
                    logger.error("%s", why)
        self._retrying = None
        return None, attempt


def _lost(connection: Connection) -> str:
    return f"the link to {connection.server} is lost"


def _interrupted(connection: Connection, broken: Exception) -> ConnectionLostError:
    error = ConnectionLostError(
        f"the link to {connection.server} was lost meanwhile: {broken}; whether it took effect is "
        "unknown"
    )
    error.__cause__ = broken
    return error


def _log_failed_try(attempt: int, error: ConnectError, warned: set[str]) -> None:
    """
    Log why a try failed: as a warning if waiting does not help, once for each distinct cause.

    :param warned: the causes that were logged as warnings since the connection was lost
    """
    level = logging.INFO
    for server, cause in error.causes.items():
        text = f"{server}: {cause}"
        if is_permanent(cause) and text not in warned:
            warned.add(text)
            level = logging.WARNING
    logger.log(level, "try %d to reconnect failed: %s", attempt, error)
