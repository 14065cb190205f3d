"""Entering and leaving a client, and choosing the exception that leaves the block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from emitter_anyio._backend.tasks import ends_program, is_cancelled
from emitter_anyio._net.options import Options
from emitter_anyio._streams import Receiver
from emitter_anyio._values.errors import ClosedError, ConnectionLostError
from emitter_anyio._values.router import Routes
from emitter_anyio._values.text import format_count

from .background import Background, gravest
from .events import Events, logger
from .slot import ClientState, Slot
from .supervisor import Supervisor


class Lifecycle:
    """
    Enters and leaves a client.

    No async generator stands between the user and the task group. If the block were never left,
    ``asyncio.run()`` would wait in that generator for tasks that nothing has cancelled.

    :param slot: the state of the client
    :param background: the tasks of the client
    :param supervisor: runs the connections
    :param events: runs the handlers
    :param routes: the streams that end with the client
    :param options: the options of the client
    :param finish: functions of the features to be called in this order when the client has ended
    """

    def __init__(
        self,
        slot: Slot,
        background: Background,
        supervisor: Supervisor,
        events: Events,
        routes: Routes[Receiver[Any]],
        options: Options,
        *,
        finish: Sequence[Callable[[], None]],
    ) -> None:
        self._slot = slot
        self._owner = slot.owner
        self._background = background
        self._supervisor = supervisor
        self._events = events
        self._routes = routes
        self._options = options
        self._finishers = finish
        # Flags and not states, because they describe how the block is left, in any state.
        self._cut_short = False
        """Whether a task failed or was cancelled natively, so that leaving waits for nothing."""
        self._closing_group = False
        """Whether leaving only waits for the task group, because :meth:`_run` is its only task."""

    # Entering

    async def enter(self) -> None:
        """
        Connect.

        :raises RuntimeError: if the client is already entered
        :raises ConnectError: if no server could be reached
        """
        slot, background = self._slot, self._background
        if background.entered:
            slot.owner.check()
            raise RuntimeError(
                "cannot enter the client: it is already entered; leave it first, or create another "
                "client with connect()"
            )
        slot.owner.claim()
        slot.enter()
        self._cut_short = self._closing_group = False
        await background.open(self._task_failed, self._start_leaving)
        try:
            connection = await self._supervisor.open_first()
            if background.block_cancelled:
                with anyio.CancelScope(shield=True):
                    await connection.abandon()
                raise _closed_while_connecting()
            self._events.start()
            self._supervisor.begin(connection)
            background.start(self._run, name="emitter_anyio connection")
        except BaseException as exc:
            if isinstance(exc, Exception):
                slot.fail_to_start(exc)
            await self._leave_here(exc)
            raise

    async def _run(self) -> None:
        if is_cancelled():
            await self._supervisor.abandon()
            return
        slot, events = self._slot, self._events
        await self._supervisor.run()
        if is_cancelled():
            return
        self._end()
        # End the handlers of "error" last, because the exceptions of other handlers go to them.
        events.end(but=("error",))
        await events.wait_done(slot.deadline, but=("error",))
        events.end()
        await events.wait_done(slot.deadline)
        slot.end()
        if self._closing_group and self._background.tasks.used:
            # Tasks were started after leaving had begun.
            await self._left()
            self._background.cancel()

    # Leaving

    async def leave(self, exc: BaseException | None) -> None:
        """
        Disconnect, and raise the exception that is to leave the block.

        :param exc: the exception of the block, if there is one
        :raises RuntimeError: if the client is not entered, or was entered in another task that is
            still running
        """
        self._owner.check()
        if not self._background.entered:
            raise RuntimeError("cannot leave the client: it is not entered")
        if self._background.tasks.hosted_here:
            await self._leave_here(exc)
        else:
            await self._leave_elsewhere(exc)

    async def disconnect(self) -> None:
        """Disconnect, and wait until the client is closed."""
        slot = self._slot
        slot.owner.check()
        if slot.started:
            self._start_leaving()
        elif slot.state is ClientState.CONNECTING and self._background.entered:
            self._background.cancel_block()
        await self.wait_closed()

    async def reconnect(self) -> None:
        """
        Replace the connection, and wait until the client is connected again.

        :raises RuntimeError: if the client never reconnects
        :raises ClosedError: if the client is closed
        :raises ConnectionLostError: after the final loss
        """
        slot = self._slot
        slot.owner.check()
        if self._options.reconnect is None:
            raise RuntimeError(
                "cannot reconnect: the client has only one connection, because of reconnect=None"
            )
        old = slot.connection
        while True:
            connection = slot.connection
            if slot.state is ClientState.CONNECTED and connection is not None:
                if connection is not old:
                    return
                self._supervisor.replace(connection)
            elif slot.public_state != "connecting" or not slot.started:
                raise slot.gone()
            await slot.change()

    async def wait_connected(self) -> None:
        """
        Wait until the client is connected, whether it is already entered or not.

        :raises ClosedError: if the client was closed or could not connect
        :raises ConnectionLostError: after the final loss
        """
        slot = self._slot
        # A client that is not entered yet has to be entered in this event loop.
        slot.owner.claim()
        try:
            await checkpoint()
            while slot.state is not ClientState.CONNECTED:
                if slot.entered_before and slot.public_state != "connecting":
                    raise slot.gone()
                await slot.change()
        finally:
            slot.owner.release()

    async def wait_closed(self) -> None:
        """Wait until the client is closed."""
        self._owner.check()
        await checkpoint()
        with self._events.awaiting_end():
            while self._slot.state is not ClientState.CLOSED:
                await self._slot.change()

    async def _leave_here(self, exc: BaseException | None) -> None:
        tasks, started = self._background.tasks, self._slot.started
        raised = self._background.leave_block(exc)
        try:
            try:
                if raised is None and not started:
                    raised = _closed_while_connecting()
                if started and not (self._cut_short or _is_cancelled(raised)):
                    await self._leave()
                    self._closing_group = raised is None and not tasks.used
                    if not self._closing_group:
                        await self._left()
            except BaseException as error:
                raised = gravest(raised, error)
            try:
                if raised is not None or not started or self._cut_short or tasks.used:
                    tasks.cancel()
                await tasks.close()
            except BaseException as error:
                raised = gravest(raised, error)
        finally:
            self._finish()
        self._raise(raised, exc)

    async def _leave_elsewhere(self, exc: BaseException | None) -> None:
        """Leave in a task that did not open the task group and cannot close it."""
        tasks = self._background.tasks
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
                "cannot leave the client in another task than the one that entered it, which is "
                "still running: the client has disconnected, but the first task must leave, too; "
                "use 'async with' in one task, or create_task(emitter.run()), wait_connected() "
                "and disconnect()"
            ) from self._background.failure or exc
        self._raise(exc, exc)

    async def _leave(self) -> None:
        connection = self._slot.connection
        if self._slot.leaving or connection is None:
            self._start_leaving()
        else:
            # disconnect() starts a task for this, because its caller might be cancelled.
            self._slot.leave()
            await self._supervisor.close(connection)

    def _start_leaving(self) -> None:
        if self._slot.has_connections and not self._slot.leaving:
            self._slot.leave()
            self._supervisor.leave()

    async def _left(self) -> None:
        while self._slot.state is not ClientState.CLOSED:
            await self._slot.change()
        await self._events.wait_done(self._slot.deadline, awaiting_end=True)

    # The end

    def _end(self) -> None:
        """Record the end of the last connection, and end the streams."""
        slot = self._slot
        unsent = self._supervisor.give_up_carried()
        if not slot.has_connections:
            return
        slot.stop()
        if slot.lost is not None:
            self._background.fail(slot.connection_lost())
        if unsent:
            message = (
                f"{format_count(unsent, 'publish', 'publishes')} of qos=0 could not be sent: the "
                "client has no connection any more"
            )
            logger.warning("%s", message)
            self._events.emit("error", ConnectionLostError(message))
        for stream in self._routes:
            if not self._events.handles(stream):
                stream.end(slot.connection_lost if slot.lost else None)

    def _finish(self) -> None:
        """End what has not ended yet, if cancellation has prevented that."""
        self._supervisor.finish()
        self._end()
        self._events.stop()
        self._background.close()
        self._slot.finish()
        for finish in self._finishers:
            finish()
        self._owner.release()

    def _task_failed(self, error: BaseException) -> None:
        if not isinstance(error, anyio.get_cancelled_exc_class()):
            self._background.fail(error)
        elif not self._slot.has_connections:
            return
        else:
            # asyncio.run() cancels tasks at its end. Reconnecting would keep it from ending.
            self._slot.give_up("a task of the client was cancelled with Task.cancel()")
        self._cut_off()

    def _cut_off(self) -> None:
        """End the client immediately."""
        self._cut_short = True
        self._supervisor.cut_off()
        self._end()
        self._slot.end()

    def _raise(self, raised: BaseException | None, exc: BaseException | None) -> None:
        """
        Raise the exception that is to leave the block, unless it is already propagating.

        :param raised: the exception of the block or of leaving it
        :param exc: the exception that is propagating
        """
        leaves, failure = raised, self._background.failure
        if failure is not None:
            # If calls in the block failed with the same loss, raise it bare and not in their group.
            same_loss = raised is not None and self._slot.is_loss(raised)
            if raised is None or ends_program(failure) or (same_loss and _is_group(raised)):
                leaves = failure
            elif not same_loss:
                raised.add_note(f"the client also failed: {failure!r}")
                logger.error(
                    "the client failed while the block was failing: %s", failure, exc_info=failure
                )
        if leaves is not None and leaves is not exc:
            context = leaves.__context__
            try:
                raise leaves
            finally:
                # Python has set the cancellation that ended the block as the context.
                leaves.__context__ = context


def _closed_while_connecting() -> ClosedError:
    return ClosedError("could not connect: disconnect() was called")


def _is_cancelled(raised: BaseException | None) -> bool:
    return raised is not None and (
        isinstance(raised, anyio.get_cancelled_exc_class()) or is_cancelled()
    )


def _is_group(error: BaseException | None) -> bool:
    return isinstance(error, BaseExceptionGroup)
