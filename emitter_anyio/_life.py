"""The life of a client: entering, the supervisor of its link, leaving, and what comes out then."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias

import anyio
from anyio.abc import TaskGroup, TaskStatus
from anyio.lowlevel import checkpoint

from ._connection import Connection, open_connection
from ._errors import ClosedError, ConnectionLostError
from ._events import EventSource, logger
from ._messages import EmitterMessage
from ._options import Options
from ._packets import Event, Packet
from ._presence import PresenceFeed
from ._router import Router
from ._session import SYSTEM, Session
from ._subscription import EventStream

State: TypeAlias = Literal["closed", "connecting", "connected", "closing"]

_AFTER_THE_LINK: Final = ("disconnect", "error")
"""Events that still come when the link is closed."""


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
    """

    received: int
    unhandled: int
    dropped: int
    nonsense: int
    queued_bytes: int
    pending: int


class Life(EventSource):
    """What an :class:`~emitter_anyio.Emitter` is between entering and leaving."""

    def __init__(self, options: Options) -> None:
        super().__init__(options.matcher)
        self._options = options
        self._state: State = "closed"
        self._entered: AbstractAsyncContextManager[Self] | None = None
        self._lived = False
        self._session = self._new_session()
        self._connection: Connection | None = None
        self._tasks: TaskGroup | None = None
        self._body: anyio.CancelScope | None = None
        self._feeds: Router[PresenceFeed] = Router(options.matcher)
        self._failure: BaseException | None = None
        self._lost: str | None = None
        self._last_error: Exception | None = None
        self._unread: list[EmitterMessage] = []
        self._leaving = False
        self._deadline = math.inf
        self._changed = anyio.Event()
        self._received = 0
        self._unhandled = 0
        self._dropped = 0
        self._nonsense = 0

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
            connection = await open_connection(self._options)
            if not scope.cancel_called:
                return connection
            await connection.abandon()
        raise ClosedError("disconnect() was called while the client was connecting")

    def _begin(self) -> None:
        self._lived = True
        self._leaving = False
        self._lost = None
        self._failure = None
        self._unread = []
        self._deadline = math.inf
        self._session = self._new_session()
        self._set_state("connecting")

    def _start(self, connection: Connection, tasks: TaskGroup) -> None:
        self._connection = connection
        self._tasks = tasks
        self._set_state("connected")
        logger.info("connected to %s", connection.server)
        self._start_handlers(tasks)
        self._emit("connect")
        tasks.start_soon(self._supervise, connection, name="emitter_anyio link")

    async def _leave(self) -> None:
        self._start_leaving()
        await self.wait_closed()
        with anyio.CancelScope(deadline=self._deadline):
            await self._handlers_done(leavers=True)

    def _start_leaving(self) -> None:
        if not self._leaving:
            self._leaving = True
            self._deadline = anyio.current_time() + self._options.disconnect_timeout
            assert self._connection is not None
            assert self._tasks is not None
            self._set_state("closing")
            self._tasks.start_soon(self._say_goodbye, self._connection)

    async def _say_goodbye(self, connection: Connection) -> None:
        with anyio.CancelScope(deadline=self._deadline):
            self._end_handlers(but=_AFTER_THE_LINK)
            await self._handlers_done(but=_AFTER_THE_LINK)
            for pending in self._session.awaited():
                done = anyio.Event()
                pending.call_when_done(done.set)
                await done.wait()
            await connection.say_goodbye(unsettled=self._session.unsettled)
        connection.close()

    async def _supervise(self, connection: Connection) -> None:
        broken = await connection.run(self._deliver, self._ping)
        self._end_link(broken)
        with anyio.CancelScope(deadline=self._deadline):
            # Those of "error" come last: another one may raise to the end.
            self._end_handlers(but=("error",))
            await self._handlers_done(but=("error",))
            self._end_handlers()
            await self._handlers_done()
        self._set_state("closed")

    def _end_link(self, broken: Exception | None) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if broken is None:
            logger.info("disconnected from %s", connection.server)
        else:
            self._lost = f"the link to {connection.server} is lost: {broken}"
            logger.warning("%s", self._lost)
            self._last_error = broken
        self._nonsense += self._session.nonsense
        self._session.nonsense = 0
        self._session.lost(self._gone)
        self._emit("disconnect")
        if broken is not None:
            self._fail(self._connection_lost())
        if not self._leaving:
            self._leaving = True
            self._deadline = anyio.current_time() + self._options.disconnect_timeout
        for stream in self._streams():
            stream.end(self._connection_lost if self._lost else None)

    def _finish(self) -> None:
        """End what cancellation has kept from ending in its own time."""
        self._end_link(None)
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
        if self._connection is not None:
            self._start_leaving()
        elif self._state == "connecting" and self._body is not None:
            self._body.cancel()
        await self.wait_closed()

    # State

    @property
    def state(self) -> State:
        """``"connecting"``, ``"connected"``, ``"closing"`` or ``"closed"``."""
        return self._state

    @property
    def connection(self) -> ConnectionInfo | None:
        """What is known of the present link; ``None`` when there is none."""
        if self._connection is None:
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
        )

    def _set_state(self, state: State) -> None:
        if state != self._state:
            self._state = state
            self._changed.set()
            self._changed = anyio.Event()

    def _link(self) -> Connection:
        if self._connection is None or self._connection.leaving:
            raise self._gone()
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
