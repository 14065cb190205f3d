"""The life of a client: entering, leaving, and what comes out then."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, Self

import anyio
from anyio.abc import TaskStatus

from ._checks import check_task_status
from ._connection import Connection
from ._errors import ClosedError, ConnectionLostError
from ._events import logger
from ._options import Options
from ._reconnecting import Reconnector
from ._tasks import Tasks


class Life(Reconnector):
    """What an :class:`~emitter_anyio.Emitter` is between entering and leaving."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._group: Tasks | None = None
        """The tasks, from entering to leaving."""
        self._body: anyio.CancelScope | None = None
        self._failure: BaseException | None = None
        self._over = True
        self._alone = False
        """Whether leaving waits for the end of the link's task, and for nothing else."""

    # Entering and leaving

    # There is no generator between the user and the task group: if it is never left, the end of
    # asyncio's run would wait in the generator for tasks that nobody has cancelled.

    async def __aenter__(self) -> Self:
        if self._group is not None:
            self._owner.check()
            raise RuntimeError(
                "this Emitter is already entered: leave it first, or make another with connect()"
            )
        self._owner.claim()
        self._begin()
        # Background tasks never raise into the group: what fails is noted and cancels the body, so
        # that its exception, collected on leaving, leaves as the same object in no group.
        tasks = Tasks(self._task_failed)
        await tasks.open()
        self._group = tasks
        self._body = anyio.CancelScope()
        self._body.__enter__()
        try:
            connection = await self._open_link(None)
            if self._body.cancel_called:
                with anyio.CancelScope(shield=True):
                    await connection.abandon()
                raise _closed_while_connecting()
            self._start(connection, tasks)
        except BaseException as exc:
            if isinstance(exc, Exception):
                self._start_failure = exc
            await self._leave_here(exc)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # It swallows nothing, and says so by its type, for the sake of type checkers.
        self._owner.check()
        if self._group is None:
            raise RuntimeError("this Emitter is not entered")
        if self._group.hosted_here:
            await self._leave_here(exc)
        else:
            await self._leave_elsewhere(exc)

    async def run(self, *, task_status: TaskStatus[Any] = anyio.TASK_STATUS_IGNORED) -> None:
        """
        Live in a task of the caller's: ``await task_group.start(emitter.run)``.

        :param task_status: is told the client once it is connected
        :raises ConnectError: if no link could be opened
        :raises ConnectionLostError: if the link is gone for good
        """
        check_task_status(task_status)
        async with self:
            task_status.started(self)
            await self.wait_closed()

    async def _leave_here(self, exc: BaseException | None) -> None:
        tasks, body = self._group, self._body
        assert tasks is not None
        assert body is not None
        raised = _left_over(body, exc)
        try:
            try:
                if raised is None and self._tasks is None:
                    raised = _closed_while_connecting()
                if self._tasks is not None and not (self._cut or _is_cancelled(raised)):
                    await self._leave()
                    self._alone = raised is None and not tasks.used
                    if not self._alone:
                        await self._left()
            except BaseException as error:
                raised = _gravest(raised, error)
            try:
                if raised is not None or self._tasks is None or self._cut or tasks.used:
                    tasks.cancel()
                await tasks.close()
            except BaseException as error:
                raised = _gravest(raised, error)
        finally:
            self._finish()
        self._raise(raised, exc)

    async def _leave_elsewhere(self, exc: BaseException | None) -> None:
        """Leave in another task than the one that has entered: its task group stays open."""
        tasks = self._group
        assert tasks is not None
        try:
            await self.disconnect()
            tasks.stop()
            await tasks.stopped()
        finally:
            self._cut_off()
            tasks.stop()
            if tasks.host_ended:
                self._finish()
        if not tasks.host_ended:
            raise RuntimeError(
                "the client was left in another task than the one that entered it, and that task "
                "still runs: it has disconnected, but the first task has to leave, too. Use 'async "
                "with' in one task; or have a task run it, by create_task(emitter.run()), wait by "
                "wait_connected(), and end it by disconnect()"
            ) from self._failure or exc
        self._raise(exc, exc)

    def _begin(self) -> None:
        if self._lived:
            self._session = self._new_session()
        self._lived = True
        self._alone = False
        self._leaving = False
        self._lost = None
        self._failure = None
        self._start_failure = None
        self._cut = False
        self._unread = []
        self._carried = []
        self._deadline = math.inf
        self._set_state("connecting")

    def _start(self, connection: Connection, tasks: Tasks) -> None:
        self._over = False
        self._tasks = tasks
        self._start_handlers(tasks)
        self._connection = connection
        logger.info("connected to %s", connection.server)
        self._be_ready()
        tasks.start(self._supervise, connection, name="emitter_anyio link")

    async def _leave(self) -> None:
        link = self._connection
        if self._leaving or link is None:
            self._start_leaving()
        else:
            # Those who only ask for it have it said by a task, which their cancellation spares.
            self._be_closing()
            await self._say_goodbye(link)

    async def _left(self) -> None:
        while self._state != "closed":
            await self._change()
        await self._handlers_done(self._deadline, leavers=True)

    def _start_leaving(self) -> None:
        if self._leaving:
            return
        self._be_closing()
        if self._connection is not None:
            self._start_goodbye(self._connection)
        elif self._retrying is not None:
            # There is a time for the goodbye, so that what is queued may find a link yet.
            if self._carried:
                self._retrying.deadline = self._deadline
            else:
                self._retrying.cancel()

    def _be_closing(self) -> None:
        self._note_leaving()
        self._set_state("closing")

    def _note_leaving(self) -> None:
        if not self._leaving:
            self._leaving = True
            self._deadline = anyio.current_time() + self._options.disconnect_timeout

    async def _supervise(self, connection: Connection) -> None:
        await self._run_links(connection)
        self._end()
        # Those of "error" come last: another one may raise to the end.
        self._end_handlers(but=("error",))
        await self._handlers_done(self._deadline, but=("error",))
        self._end_handlers()
        await self._handlers_done(self._deadline)
        self._set_state("closed")
        assert self._tasks is not None
        if self._alone and self._tasks.used:
            # Somebody has come since.
            await self._left()
            self._tasks.cancel()

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
        self._group = None
        self._owner.release()

    def _raise(self, raised: BaseException | None, exc: BaseException | None) -> None:
        """
        Raise what is to leave the block, or nothing if it is on its way.

        :param raised: what the block has raised, or leaving it
        :param exc: what is on its way
        """
        leaves, failure = raised, self._failure
        if failure is not None:
            # Tasks of the body may have met the same loss in their calls: it leaves bare, too.
            met = raised is not None and self._is_this_loss(raised)
            if raised is None or _ends_program(failure) or (met and _is_group(raised)):
                leaves = failure
            elif not met:
                raised.add_note(f"meanwhile in emitter_anyio: {failure!r}")
                logger.error("%s, while the body was failing", failure, exc_info=failure)
        if leaves is not None and leaves is not exc:
            context = leaves.__context__
            try:
                raise leaves
            finally:
                # Not the cancellation by which the body has come to its end.
                leaves.__context__ = context

    def _is_this_loss(self, error: BaseException) -> bool:
        if isinstance(error, BaseExceptionGroup):
            return all(map(self._is_this_loss, error.exceptions))
        return isinstance(error, ConnectionLostError) and error.unread is self._unread

    def _passes(self, error: BaseException) -> bool:
        if isinstance(error, ExceptionGroup):
            return all(map(self._passes, error.exceptions))
        transient = isinstance(error, ConnectionLostError) and self._options.reconnect is not None
        return transient and self._lost is None

    def _task_failed(self, error: BaseException) -> None:
        """End it all now, as a task has ended that was still needed."""
        if not isinstance(error, anyio.get_cancelled_exc_class()):
            self._fail(error)
        elif self._over:
            return
        else:
            # By Task.cancel(), as when asyncio's run ends.
            self._lost = self._lost or "a task of the client was cancelled by Task.cancel()"
        self._cut_off()

    def _cut_off(self) -> None:
        """Have it all end now."""
        self._cut = True
        if (link := self._connection) is not None:
            self._end_link(link, None)
            link.close()
        if self._retrying is not None:
            self._retrying.cancel()
        self._end()
        self._set_state("closed")

    def _fail(self, error: BaseException) -> None:
        self._failure = _gravest(self._failure, error)
        assert self._body is not None
        assert self._group is not None
        if not self._group.host_ended:
            self._body.cancel()

    async def disconnect(self) -> None:
        """
        Leave now; returns when the link is closed.

        It may be called from any task of the client's event loop, any number of times. Handlers
        finish what waits for them, what is queued is sent, then comes DISCONNECT, all within
        ``disconnect_timeout``. Streams end behind what is buffered; the body of the ``async with``
        goes on, and finds every verb raising :class:`ClosedError`. Cancelling it does not stop the
        leaving.
        """
        self._owner.check()
        self._handler_leaves()
        if self._tasks is not None:
            self._start_leaving()
        elif self._state == "connecting" and self._body is not None:
            self._body.cancel()
        await self.wait_closed()


def _closed_while_connecting() -> ClosedError:
    return ClosedError("disconnect() was called while the client was connecting")


def _left_over(scope: anyio.CancelScope, exc: BaseException | None) -> BaseException | None:
    """Leave a scope, and give what goes on: of a group, what is not its cancellation."""
    try:
        return None if scope.__exit__(None if exc is None else type(exc), exc, None) else exc
    except BaseException as remaining:
        return remaining


def _is_cancelled(raised: BaseException | None) -> bool:
    return raised is not None and (
        isinstance(raised, anyio.get_cancelled_exc_class())
        or anyio.current_effective_deadline() == -math.inf
    )


def _gravest(first: BaseException | None, second: BaseException) -> BaseException:
    return (
        second if first is None or (_ends_program(second) and not _ends_program(first)) else first
    )


def _ends_program(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt | SystemExit)


def _is_group(error: BaseException | None) -> bool:
    return isinstance(error, BaseExceptionGroup)
