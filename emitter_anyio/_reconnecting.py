"""One link after another: whether there is one to use, and what makes the next as good."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Final, Literal, TypeAlias

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from ._connection import Connection, is_permanent, open_connection
from ._delivery import Delivery
from ._errors import (
    ClosedError,
    ConnectError,
    ConnectionLostError,
    RequestTimeoutError,
    portable,
)
from ._events import logger
from ._options import Options, check_connect_size
from ._tasks import Tasks

State: TypeAlias = Literal["closed", "connecting", "connected", "closing"]


@dataclass(frozen=True, slots=True)
class Restoration:
    """
    Something that a new link has to have, and that the broker is being asked for.

    :ivar what: what it is, in words
    :ivar answered: waits for what the broker says
    :ivar refused: is told why it cannot be had any more
    """

    what: str
    # Neither is shown, since they may hold a key.
    answered: Callable[[], Awaitable[None]] = field(repr=False)
    refused: Callable[[Exception], None] = field(repr=False)


Restorer: TypeAlias = Callable[[], Iterable[Restoration]]
"""Asks at once for what a new link has to have."""

_AFTER_THE_LINK: Final = ("disconnect", "error")
"""Events that still come when the link is closed."""

_INTERRUPTED: Final = (ClosedError, ConnectionLostError, RequestTimeoutError)
"""What says of a restoration that the link, and not what is restored, has come to nothing."""

_GOOD_SECONDS: Final = 10.0
"""
The age at which the loss of a connection restarts the back-off.

A broker that accepts connections and soon closes them must not be contacted without pause.
"""


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """
    What is known of the present link.

    :ivar server: where it goes, as a URL without user and password
    :ivar since: when the broker acknowledged it
    :ivar id: the connection's id, once ``me()`` has asked for it on this link
    :ivar last_error: why the link before it ended, if one has broken
    """

    server: str
    since: datetime
    id: str | None
    last_error: Exception | None

    def __reduce__(self) -> tuple[Any, ...]:
        error = None if self.last_error is None else portable(self.last_error)
        return type(self), (self.server, self.since, self.id, error)


@dataclass(frozen=True, slots=True)
class Statistics:
    """
    Figures of a client since it was made.

    :ivar received: how many messages the broker has delivered
    :ivar unhandled: how many of them no stream and no handler took
    :ivar dropped: how many items streams and handlers have dropped for want of room
    :ivar nonsense: how many things came that the broker would not send
    :ivar queued_bytes: how many bytes wait for the link
    :ivar pending: how many acknowledgements are outstanding
    :ivar links: how many links there have been
    :ivar uncertain: how many publishes of ``qos=0`` had been handed to a link that was then lost:
        the broker may have taken them or not, and they are not sent again
    :ivar unsent: how many publishes of ``qos=0`` were given up, since there was no next link
    """

    received: int
    unhandled: int
    dropped: int
    nonsense: int
    queued_bytes: int
    pending: int
    links: int
    uncertain: int
    unsent: int


class Reconnector(Delivery):
    """What an :class:`~emitter_anyio.Emitter` has of its links, one after another."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._state: State = "closed"
        self._changed: anyio.Event | None = None
        self._lived = False
        self._start_failure: Exception | None = None
        """Why the client could not be started."""
        self._cut = False
        """Whether something has cancelled a task of the client, so that all of them end now."""
        self._leaving = False
        self._deadline = math.inf
        """Until when there is time for the goodbye."""
        self._will_key: str | None = None
        self._ready = False
        """Whether the present link has all that the ones before it had."""
        self._ready_since = math.inf
        self._carried: list[bytes] = []
        """Publishes that were accepted, and of which no link has had a byte."""
        self._restorers: list[Restorer] = []
        self._retrying: anyio.CancelScope | None = None
        self._tasks: Tasks | None = None
        self._link_tasks: TaskGroup | None = None
        """For what restores the present link, and ends with it."""
        self._restorers_now: set[int] = set()
        """The tasks that restore the present link. What a key function starts is none of them."""
        self._last_error: Exception | None = None
        self._received_before = 0
        """How many messages had been received when the last link ended."""
        self._nonsense = 0
        self._links_had = 0
        self._uncertain = 0
        self._unsent = 0

    # Whether there is one

    @property
    def state(self) -> State:
        """
        ``"connecting"`` (between two links, too), ``"connected"``, ``"closing"`` or ``"closed"``.
        """
        return self._state

    @property
    def connection(self) -> ConnectionInfo | None:
        """What is known of the present link; ``None`` when there is none."""
        if self._connection is None or not self._ready:
            return None
        return ConnectionInfo(
            str(self._connection.server),
            self._connection.since,
            self._session.connection_id,
            self._last_error,
        )

    async def wait_connected(self) -> None:
        """
        Wait until there is a link; for a client that has not been entered yet, too.

        :raises ClosedError: if the client was left, or could not connect
        :raises ConnectionLostError: if the link is gone for good
        """
        # Before the client is entered, too: it is then entered in the same event loop.
        self._owner.claim()
        try:
            await checkpoint()
            while self._state != "connected":
                if self._lived and self._state != "connecting":
                    raise self._gone()
                await self._change()
        finally:
            self._owner.release()

    async def wait_closed(self) -> None:
        """Wait until the link is closed; returns at once when there is none."""
        self._owner.check()
        await checkpoint()
        while self._state != "closed":
            await self._change()

    def statistics(self) -> Statistics:
        """Return the figures of this client."""
        writer = None if self._connection is None else self._connection.writer
        return Statistics(
            self._received,
            self._unhandled,
            self._dropped + sum(stream.dropped for stream in self._streams()),
            self._nonsense + self._session.nonsense,
            0 if writer is None else writer.size,
            self._session.pending,
            self._links_had,
            self._uncertain,
            self._unsent,
        )

    def _set_state(self, state: State) -> None:
        if state != self._state:
            self._state = state
            self._changed_now()

    def _changed_now(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _change(self) -> None:
        """Wait until something of the link or of the state changes."""
        if self._changed is None or not self._changed.statistics().tasks_waiting:
            # One that nobody waits for may be of an event loop before this one.
            self._changed = anyio.Event()
        await self._changed.wait()

    def _usable(self, link: Connection | None) -> bool:
        return (
            link is not None
            and link is self._connection
            and not link.leaving
            and (self._ready or self._restores())
        )

    def _restores(self) -> bool:
        """Tell whether this task restores a link."""
        return bool(self._restorers_now) and anyio.get_current_task().id in self._restorers_now

    def _may_come(self) -> bool:
        """Tell whether a link may come that can be used."""
        if self._state == "closing":
            return self._connection is not None and not self._ready
        return self._state == "connecting" and self._tasks is not None

    async def _linked(self) -> Connection:
        """Wait until there is a link to use, if there may be one."""
        self._owner.check()
        while not self._usable(self._connection):
            if not self._may_come():
                raise self._gone()
            if self._options.while_down == "raise":
                raise ConnectionLostError("the link is away, and another one is being opened")
            await self._change()
        assert self._connection is not None
        return self._connection

    def _gone(self) -> Exception:
        if self._lost is not None:
            return self._connection_lost()
        if not self._lived:
            return ClosedError(
                "the client is not entered: use it inside 'async with connect(…) as emitter:', "
                "or start its run() first"
            )
        error = ClosedError("the client is closed: it has disconnected, or was never connected")
        error.__cause__ = self._start_failure
        return error

    def _connection_lost(self) -> ConnectionLostError:
        error = ConnectionLostError(self._lost or "the link is lost", self._unread)
        error.__cause__ = self._last_error
        return error

    # One after another

    async def _run_links(self, first: Connection) -> None:
        attempt = 0
        link: Connection | None = first
        while link is not None:
            broken = await self._run_link(link)
            if link.timer.clock() > self._ready_since + _GOOD_SECONDS:
                attempt = 0
            self._ready_since = math.inf
            link, attempt = await self._next_link(link, broken, attempt)

    async def _run_link(self, link: Connection) -> Exception | None:
        # In the turn in which a link has ended: those whom it has let go must find none any more.
        assert self._tasks is not None
        if self._ready:
            broken = await link.run(self._deliver, self._ping, self._tasks)
            self._end_link(link, broken)
            return broken
        async with anyio.create_task_group() as self._link_tasks:
            self._link_tasks.start_soon(self._tasks.run, self._restore, link, self._ask_again())
            if self._leaving:
                self._start_goodbye(link)
            broken = await link.run(self._deliver, self._ping, self._tasks)
            self._end_link(link, broken)
            self._link_tasks.cancel_scope.cancel()
        return broken

    async def _open_link(self, last: Connection | None) -> Connection:
        will = self._options.will
        if will is not None:
            # A function that stands for the key is asked for the first link only: it may want to
            # use the client, which waits for the next one.
            self._will_key = self._keys.known(will.key) or self._will_key
            try:
                with anyio.fail_after(self._options.connect_timeout):
                    self._will_key = self._will_key or await self._keys.get(will.key)
                check_connect_size(self._options, self._will_key)
            except Exception as exc:
                raise ConnectError(f"there is no key of the will: {exc!r}") from exc
        after = None if last is None else last.server
        return await open_connection(self._options, will_key=self._will_key, after=after)

    def _be_ready(self) -> None:
        self._ready = True
        assert self._connection is not None
        self._ready_since = self._connection.timer.clock()
        self._links_had += 1
        if not self._leaving:
            self._set_state("connected")
        self._changed_now()
        self._emit("connect")

    def _start_goodbye(self, connection: Connection) -> None:
        assert self._tasks is not None
        self._tasks.start_soon(self._say_goodbye, connection)

    async def _say_goodbye(self, connection: Connection) -> None:
        quiet = self._ready and not (self._busy or self._session.pending or self._session.unsettled)
        if not (quiet and connection.blurt_goodbye()):
            with anyio.CancelScope(deadline=self._deadline):
                await self._wait_and_say_goodbye(connection)
        connection.close()

    async def _wait_and_say_goodbye(self, connection: Connection) -> None:
        while self._connection is connection and not self._ready:
            await self._change()
        self._end_handlers(but=_AFTER_THE_LINK)
        await self._handlers_done(self._deadline, but=_AFTER_THE_LINK)
        for pending in self._session.awaited():
            done = anyio.Event()
            pending.call_when_done(done.set)
            await done.wait()
        await connection.say_goodbye(unsettled=self._session.unsettled)

    def _ask_again(self) -> list[Restoration]:
        # All is asked before anything is waited for: what is given up meanwhile finds either
        # nothing on this link, or something to be taken back behind it.
        return [asked for restorer in self._restorers for asked in restorer()]

    async def _restore(self, link: Connection, asked: Sequence[Restoration]) -> None:
        """See to it that a new link has all that the last one had, and let everybody use it."""
        assert self._tasks is not None
        async with anyio.create_task_group() as tasks:
            for one in asked:
                tasks.start_soon(self._tasks.run, self._await_restored, link, one)
        if link is self._connection and not link.broken:
            carried, self._carried = self._carried, []
            self._session.published += len(carried)
            link.send_again(carried)
            logger.info("connected again to %s, with %d things restored", link.server, len(asked))
            self._be_ready()

    async def _await_restored(self, link: Connection, one: Restoration) -> None:
        try:
            with self._restoring():
                await one.answered()
        except _INTERRUPTED as exc:
            link.fail(exc)
        except Exception as exc:
            logger.warning("%s could not be restored: %s", one.what, exc)
            one.refused(exc)

    @contextmanager
    def _restoring(self) -> Generator[None]:
        """Let this task use a link that is being restored, before all others may."""
        task = anyio.get_current_task().id
        self._restorers_now.add(task)
        try:
            yield
        finally:
            self._restorers_now.discard(task)

    async def _next_link(
        self, last: Connection, broken: Exception | None, attempt: int
    ) -> tuple[Connection | None, int]:
        backoff = self._options.reconnect
        if broken is None or backoff is None or (self._leaving and not self._carried):
            return None, attempt
        deadline = self._deadline if self._leaving else math.inf
        warned: set[str] = set()
        with anyio.CancelScope(deadline=deadline) as self._retrying:
            await anyio.sleep(backoff.spread_delay())
            while backoff.tries is None or attempt < backoff.tries:
                delay = backoff.delay(attempt)
                attempt += 1
                await anyio.sleep(delay)
                try:
                    link = await self._open_link(last)
                except ConnectError as exc:
                    self._last_error = exc
                    _log_failed_try(attempt, exc, warned)
                    continue
                self._connection = link
                self._retrying = None
                return link, attempt
            if not self._leaving:
                self._lost = (
                    f"{self._lost_link(last)}, and {attempt} tries have opened no other: "
                    f"{self._last_error}"
                )
                logger.error("%s", self._lost)
        self._retrying = None
        return None, attempt

    def _lost_link(self, link: Connection) -> str:
        return f"the link to {link.server} is lost"

    def _end_link(self, link: Connection, broken: Exception | None) -> None:
        """Take leave of a link, if it is there; what may go on is kept for the next one."""
        if link is not self._connection:
            return
        was_ready, self._ready = self._ready, False
        self._connection = None
        self._nonsense += self._session.nonsense
        self._session.nonsense = 0
        # What had to wait for the restoration comes behind what this link has not sent either.
        unsent = link.unsent
        self._carried = [*unsent, *self._carried]
        gone: Callable[[], Exception] = self._gone
        if broken is None:
            logger.info("disconnected from %s", link.server)
        else:
            self._last_error = broken
            logger.warning("%s: %s", self._lost_link(link), broken)
            if self._options.reconnect is None:
                self._lost = f"{self._lost_link(link)}: {broken}"
            else:
                gone = partial(self._interrupted, link, broken)
                if not self._leaving:
                    self._set_state("connecting")
        uncertain = self._session.lost(gone) - len(unsent)
        if uncertain and not link.seen_off:
            self._uncertain += uncertain
            logger.warning(
                "%d publishes of qos=0 were under way: the broker may have taken them or not",
                uncertain,
            )
        self._changed_now()
        if was_ready or self._received > self._received_before:
            # Where a link that was being restored has brought messages, others may be missing.
            self._link_lost()
        self._received_before = self._received
        if was_ready:
            self._emit("disconnect")

    def _interrupted(self, link: Connection, broken: Exception) -> ConnectionLostError:
        error = ConnectionLostError(
            f"the link to {link.server} was lost meanwhile: {broken}; whether it took effect is "
            "unknown"
        )
        error.__cause__ = broken
        return error

    def _link_lost(self) -> None:
        """Tell those who must know that what was under way will not come."""


def _log_failed_try(attempt: int, error: ConnectError, warned: set[str]) -> None:
    """
    Log why a try failed: as a warning where waiting does not help, once for each distinct cause.

    :param warned: the causes that were logged as warnings since the connection was lost
    """
    level = logging.INFO
    for server, cause in error.causes.items():
        text = f"{server}: {cause}"
        if is_permanent(cause) and text not in warned:
            warned.add(text)
            level = logging.WARNING
    logger.log(level, "try %d to reconnect failed: %s", attempt, error)
