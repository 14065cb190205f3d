"""The life of a client: entering, the supervisor of its link, leaving, and what comes out then."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias

import anyio
from anyio.abc import TaskGroup, TaskStatus
from anyio.lowlevel import checkpoint

from ._connection import Connection, open_connection
from ._errors import (
    ClosedError,
    ConnectError,
    ConnectionLostError,
    RequestTimeoutError,
    UnauthorizedError,
)
from ._events import EventSource, logger
from ._keys import KeyRing
from ._messages import EmitterMessage
from ._options import Options
from ._packets import Event, Packet
from ._presence import PresenceFeed
from ._router import Router
from ._session import SYSTEM, Session
from ._subscription import EventStream

State: TypeAlias = Literal["closed", "connecting", "connected", "closing"]

Restorer: TypeAlias = Callable[[], Iterable[Callable[[], Awaitable[None]]]]
"""Asks at once for what a new link has to have, and gives what waits for the answers."""

_AFTER_THE_LINK: Final = ("disconnect", "error")
"""Events that still come when the link is closed."""

INTERRUPTED: Final = (ClosedError, ConnectionLostError, RequestTimeoutError)
"""What says of a restoration that the link, and not what is restored, has come to nothing."""

RESTORING: Final[ContextVar[bool]] = ContextVar("emitter_anyio restoring", default=False)
"""Whether the present task restores a link, and so may use it before all others may."""


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


class Life(EventSource):
    """What an :class:`~emitter_anyio.Emitter` is between entering and leaving."""

    def __init__(self, options: Options) -> None:
        super().__init__(options.matcher)
        self._options = options
        self._state: State = "closed"
        self._entered: AbstractAsyncContextManager[Self] | None = None
        self._lived = False
        self._session = self._new_session()
        self._keys = KeyRing()
        self._will_key: str | None = None
        self._connection: Connection | None = None
        self._ready_since = math.inf
        self._ready = False
        """Whether the present link has all that the ones before it had."""
        self._carried: list[bytes] = []
        """Publishes that were accepted, and of which no link has had a byte."""
        self._restorers: list[Restorer] = []
        self._retrying: anyio.CancelScope | None = None
        self._tasks: TaskGroup | None = None
        self._link_tasks: TaskGroup | None = None
        """For what ends with the present link."""
        self._body: anyio.CancelScope | None = None
        self._feeds: Router[PresenceFeed] = Router(options.matcher)
        self._failure: BaseException | None = None
        self._lost: str | None = None
        self._last_error: Exception | None = None
        self._unread: list[EmitterMessage] = []
        self._leaving = False
        self._over = True
        self._deadline = math.inf
        self._changed = anyio.Event()
        self._received = 0
        self._received_before = 0
        """How many messages had been received when the last link ended."""
        self._unhandled = 0
        self._dropped = 0
        self._nonsense = 0
        self._links_had = 0
        self._uncertain = 0
        self._unsent = 0

    # Entering and leaving

    async def __aenter__(self) -> Self:
        # AnyIO's mixin does the same, but says less when somebody enters twice.
        if self._entered is not None:
            raise RuntimeError(
                "this Emitter is already entered: leave it first, or make another with connect()"
            )
        self._entered = self._live()
        try:
            return await self._entered.__aenter__()
        except BaseException:
            self._entered = None
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # It swallows nothing, and says so by its type, for the sake of type checkers.
        assert self._entered is not None
        try:
            await self._entered.__aexit__(exc_type, exc, traceback)
        finally:
            self._entered = None

    async def run(self, *, task_status: TaskStatus[Any] = anyio.TASK_STATUS_IGNORED) -> None:
        """
        Live in a task of the caller's: ``await task_group.start(emitter.run)``.

        :param task_status: is told the client once it is connected
        :raises ConnectError: if no link could be opened
        :raises ConnectionLostError: if the link is gone for good
        """
        async with self:
            task_status.started(self)
            await self.wait_closed()

    @asynccontextmanager
    async def _live(self) -> AsyncGenerator[Self]:
        self._begin()
        raised: BaseException | None = None
        try:
            connection = await self._open(anyio.CancelScope())
            # Background tasks never raise into the group: what fails is noted and cancels the
            # body, so that its exception, collected here, leaves as the same object in no group.
            async with anyio.create_task_group() as tasks:
                self._start(connection, tasks)
                try:
                    with anyio.CancelScope() as self._body:
                        yield self
                except BaseException as exc:
                    raised = exc
                try:
                    if not _is_cancelled(raised):
                        await self._leave()
                except BaseException as exc:
                    raised = raised or exc
                tasks.cancel_scope.cancel()
        finally:
            self._finish()
        self._raise(raised)

    async def _open(self, scope: anyio.CancelScope) -> Connection:
        self._body = scope
        with scope:
            connection = await self._open_link(None)
            if not scope.cancel_called:
                return connection
            await connection.abandon()
        raise ClosedError("disconnect() was called while the client was connecting")

    async def _open_link(self, last: Connection | None) -> Connection:
        will = self._options.will
        if will is not None:
            # A function that stands for the key is asked for the first link only: it may want to
            # use the client, which waits for the next one.
            self._will_key = self._keys.known(will.key) or self._will_key
            try:
                with anyio.fail_after(self._options.connect_timeout):
                    self._will_key = self._will_key or await self._keys.get(will.key)
            except Exception as exc:
                raise ConnectError(f"there is no key of the will: {exc!r}") from exc
        after = None if last is None else last.server
        return await open_connection(self._options, will_key=self._will_key, after=after)

    def _begin(self) -> None:
        self._lived = True
        self._leaving = False
        self._lost = None
        self._failure = None
        self._unread = []
        self._carried = []
        self._deadline = math.inf
        self._session = self._new_session()
        self._set_state("connecting")

    def _start(self, connection: Connection, tasks: TaskGroup) -> None:
        self._over = False
        self._tasks = tasks
        self._start_handlers(tasks)
        self._connection = connection
        logger.info("connected to %s", connection.server)
        self._be_ready()
        tasks.start_soon(self._supervise, connection, name="emitter_anyio link")

    def _be_ready(self) -> None:
        self._ready = True
        self._ready_since = anyio.current_time()
        self._links_had += 1
        if not self._leaving:
            self._set_state("connected")
        self._changed_now()
        self._emit("connect")

    # Leaving

    async def _leave(self) -> None:
        self._start_leaving()
        await self.wait_closed()
        with anyio.CancelScope(deadline=self._deadline):
            await self._handlers_done(leavers=True)

    def _start_leaving(self) -> None:
        if self._leaving:
            return
        self._note_leaving()
        self._set_state("closing")
        if self._connection is not None:
            self._start_goodbye(self._connection)
        elif self._retrying is not None:
            # There is a time for the goodbye, so that what is queued may find a link yet.
            if self._carried:
                self._retrying.deadline = self._deadline
            else:
                self._retrying.cancel()

    def _note_leaving(self) -> None:
        if not self._leaving:
            self._leaving = True
            self._deadline = anyio.current_time() + self._options.disconnect_timeout

    def _start_goodbye(self, connection: Connection) -> None:
        assert self._tasks is not None
        self._tasks.start_soon(self._say_goodbye, connection)

    async def _say_goodbye(self, connection: Connection) -> None:
        with anyio.CancelScope(deadline=self._deadline):
            while self._connection is connection and not self._ready:
                await self._changed.wait()
            self._end_handlers(but=_AFTER_THE_LINK)
            await self._handlers_done(but=_AFTER_THE_LINK)
            for pending in self._session.awaited():
                done = anyio.Event()
                pending.call_when_done(done.set)
                await done.wait()
            await connection.say_goodbye(unsettled=self._session.unsettled)
        connection.close()

    # The links, one after another

    async def _supervise(self, connection: Connection) -> None:
        attempt = 0
        link: Connection | None = connection
        while link is not None:
            broken = await self._run_link(link)
            if anyio.current_time() > self._ready_since + self._longest(attempt):
                attempt = 0
            self._ready_since = math.inf
            link, attempt = await self._next_link(link, broken, attempt)
        self._end()
        with anyio.CancelScope(deadline=self._deadline):
            # Those of "error" come last: another one may raise to the end.
            self._end_handlers(but=("error",))
            await self._handlers_done(but=("error",))
            self._end_handlers()
            await self._handlers_done()
        self._set_state("closed")

    def _longest(self, attempt: int) -> float:
        backoff = self._options.reconnect
        return math.inf if backoff is None else backoff.longest(attempt)

    async def _run_link(self, link: Connection) -> Exception | None:
        async with anyio.create_task_group() as tasks:
            self._link_tasks = tasks
            if not self._ready:
                tasks.start_soon(self._restore, link, self._ask_again())
            if self._leaving:
                self._start_goodbye(link)
            broken = await link.run(self._deliver, self._ping)
            # In the same turn: those whom the link has let go must find that it is none any more.
            self._end_link(link, broken)
            tasks.cancel_scope.cancel()
        return broken

    def _ask_again(self) -> list[Callable[[], Awaitable[None]]]:
        # All is asked before anything is waited for: what is given up meanwhile finds either
        # nothing on this link, or something to be taken back behind it.
        return [wait for restorer in self._restorers for wait in restorer()]

    async def _restore(
        self, link: Connection, waits: Sequence[Callable[[], Awaitable[None]]]
    ) -> None:
        """See to it that a new link has all that the last one had, and let everybody use it."""
        RESTORING.set(True)
        async with anyio.create_task_group() as tasks:
            for wait in waits:
                tasks.start_soon(self._await_restored, link, wait)
        if link is self._connection and not link.broken:
            carried, self._carried = self._carried, []
            self._session.published(len(carried))
            link.send_again(carried)
            logger.info("connected again to %s, with %d things restored", link.server, len(waits))
            self._be_ready()

    async def _await_restored(self, link: Connection, wait: Callable[[], Awaitable[None]]) -> None:
        try:
            await wait()
        except INTERRUPTED as exc:
            link.fail(exc)
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as exc:
            self._fail(exc)

    async def _next_link(
        self, last: Connection, broken: Exception | None, attempt: int
    ) -> tuple[Connection | None, int]:
        backoff = self._options.reconnect
        if broken is None or backoff is None or (self._leaving and not self._carried):
            return None, attempt
        deadline = self._deadline if self._leaving else math.inf
        with anyio.CancelScope(deadline=deadline) as self._retrying:
            while backoff.tries is None or attempt < backoff.tries:
                delay = backoff.delay(attempt)
                attempt += 1
                await anyio.sleep(delay)
                try:
                    link = await self._open_link(last)
                except ConnectError as exc:
                    self._last_error = exc
                    logger.info("try %d to connect again: %s", attempt, exc)
                    continue
                if self._retrying.cancel_called:
                    await link.abandon()
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
        """Take leave of a link; what may go on is kept for the next one."""
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

    def _link_lost(self) -> None:
        """Tell those who must know that what was under way will not come."""

    def _end(self) -> None:
        """There will be no link any more."""
        unsent, self._carried = len(self._carried), []
        self._unsent += unsent
        if self._over:
            return
        self._over = True
        if self._lost is not None:
            self._fail(self._connection_lost())
        if unsent:
            words = f"{unsent} publishes of qos=0 were never sent, since the link is gone for good"
            logger.warning("%s", words)
            self._emit("error", ConnectionLostError(words))
        self._note_leaving()
        for stream in self._streams():
            stream.end(self._connection_lost if self._lost else None)

    def _finish(self) -> None:
        """End what cancellation has kept from ending in its own time."""
        if self._connection is not None:
            self._end_link(self._connection, None)
        self._retrying = None
        self._end()
        self._stop_handlers()
        self._tasks = None
        self._set_state("closed")

    def _raise(self, raised: BaseException | None) -> None:
        failure = self._failure
        if failure is None:
            if raised is not None:
                raise raised
        elif raised is None or isinstance(failure, KeyboardInterrupt | SystemExit):
            raise failure
        elif isinstance(raised, BaseExceptionGroup) and self._is_this_loss(raised):
            # Tasks of the body have met the same loss in their calls: it leaves bare all the same.
            raise failure
        elif self._is_this_loss(raised):
            raise raised
        else:
            raised.add_note(f"meanwhile in emitter_anyio: {failure!r}")
            logger.error("%s, while the body was failing", failure, exc_info=failure)
            raise raised

    def _is_this_loss(self, error: BaseException) -> bool:
        if isinstance(error, BaseExceptionGroup):
            return all(map(self._is_this_loss, error.exceptions))
        return isinstance(error, ConnectionLostError) and error.unread is self._unread

    def _passes(self, error: Exception) -> bool:
        if isinstance(error, ExceptionGroup):
            return all(map(self._passes, error.exceptions))
        transient = isinstance(error, ConnectionLostError) and self._options.reconnect is not None
        return transient and self._lost is None

    def _fail(self, error: BaseException) -> None:
        if self._failure is None or not isinstance(error, Exception):
            self._failure = error
        assert self._body is not None
        self._body.cancel()

    async def disconnect(self) -> None:
        """
        Leave now; returns when the link is closed.

        It may be called from anywhere, any number of times. Handlers finish what waits for them,
        what is queued is sent, then comes DISCONNECT, all within ``disconnect_timeout``. Streams
        end behind what is buffered; the body of the ``async with`` goes on, and finds every verb
        raising :class:`ClosedError`. Cancelling it does not stop the leaving.
        """
        self._handler_leaves()
        if self._tasks is not None:
            self._start_leaving()
        elif self._state == "connecting" and self._body is not None:
            self._body.cancel()
        await self.wait_closed()

    # State

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
        await checkpoint()
        while self._state != "connected":
            if self._lived and self._state != "connecting":
                raise self._gone()
            await self._changed.wait()

    async def wait_closed(self) -> None:
        """Wait until the link is closed; returns at once when there is none."""
        await checkpoint()
        while self._state != "closed":
            await self._changed.wait()

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
        self._changed.set()
        self._changed = anyio.Event()

    def _usable(self, link: Connection | None) -> bool:
        return (
            link is not None
            and link is self._connection
            and not link.leaving
            and (self._ready or RESTORING.get())
        )

    def _may_come(self) -> bool:
        """Tell whether a link may come that can be used."""
        if self._state == "closing":
            return self._connection is not None and not self._ready
        return self._state == "connecting" and self._tasks is not None

    async def _linked(self) -> Connection:
        """Wait until there is a link to use, if there may be one."""
        while not self._usable(self._connection):
            if not self._may_come():
                raise self._gone()
            if self._options.while_down == "raise":
                raise ConnectionLostError("the link is away, and another one is being opened")
            await self._changed.wait()
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
        return ClosedError("the client is closed: it has disconnected, or was never connected")

    def _connection_lost(self) -> ConnectionLostError:
        error = ConnectionLostError(self._lost or "the link is lost", self._unread)
        error.__cause__ = self._last_error
        return error

    def _interrupted(self, link: Connection, broken: Exception) -> ConnectionLostError:
        error = ConnectionLostError(
            f"the link to {link.server} was lost meanwhile: {broken}; whether it took effect is "
            "unknown"
        )
        error.__cause__ = broken
        return error

    # What comes in

    async def _deliver(self, events: Sequence[Event]) -> None:
        router, session = self._routers["message"], self._session
        for event in events:
            if isinstance(event, EmitterMessage) and not event.channel.startswith(SYSTEM):
                await self._deliver_message(event, router.receivers(event.channel))
                continue
            for emission in session.receive(event):
                if emission.event == "message":
                    message = emission.value
                    await self._deliver_message(message, router.receivers(message.channel))
                elif emission.event == "error":
                    if isinstance(emission.value, UnauthorizedError):
                        self._keys.doubt()
                    self._report(emission.value)
                else:
                    for stream in self._receivers(emission.event, emission.value):
                        await self._hand_over(stream, emission.value)
                    if emission.event == "presence":
                        await self._deliver_presence(emission.value)

    async def _deliver_message(
        self, message: EmitterMessage, streams: Sequence[EventStream[Any]]
    ) -> None:
        self._received += 1
        replayed = bool(self._session.replays) and self._session.in_replay(message)
        for stream in streams:
            if not stream.push(message, extra=replayed):
                await self._hand_over(stream, message)
        if not streams:
            self._unhandled += 1
            if self._unhandled == 1:
                logger.warning(
                    "a message from %r reached no stream and no handler; it and the like are "
                    "counted in statistics().unhandled",
                    message.channel[:64],
                )

    async def _deliver_presence(self, event: Any) -> None:
        if event.event == "status":
            return
        for feed in self._feeds.receivers(event.channel):
            feed.note(event)
            await self._hand_over(feed, event)

    async def _hand_over(self, stream: EventStream[Any], item: Any) -> None:
        if not stream.push(item):
            if self._connection is not None and stream.blocks:
                self._connection.held_up = True
            await stream.make_room()
            stream.push_or_drop(item)

    def _streams(self) -> list[EventStream[Any]]:
        handlers = {id(registration.stream) for registration in self._registrations}
        found: list[EventStream[Any]] = [*self._feeds]
        for router in self._routers.values():
            found += [stream for stream in router if id(stream) not in handlers]
        return found

    def _leave_stream(self, stream: EventStream[Any]) -> None:
        if self._lost is not None:
            known = {id(message) for message in self._unread}
            self._unread += [
                item
                for item in stream.drain()
                if isinstance(item, EmitterMessage) and id(item) not in known
            ]
        self._dropped += stream.dropped
        stream.close()

    def _new_session(self) -> Session:
        return Session(
            self._send_packet,
            matcher=self._options.matcher,
            allow_collisions=self._options.allow_collisions,
        )

    def _send_packet(self, packet: Packet) -> None:
        # Not by _link(): behind DISCONNECT nothing leaves, and what is given back then need not.
        assert self._connection is not None
        self._connection.send(packet)

    def _ping(self) -> None:
        self._session.ping(awaited=False)


def _is_cancelled(raised: BaseException | None) -> bool:
    return raised is not None and (
        isinstance(raised, anyio.get_cancelled_exc_class())
        or anyio.current_effective_deadline() == -math.inf
    )
