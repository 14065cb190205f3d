"""The ``on()`` registry: handlers with their tasks, and streams of events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Final, TypeAlias

import anyio

from emitter_anyio._backend.tasks import is_cancelled
from emitter_anyio._streams import Entering, EventStream, Overflow, Receiver, Sender, check_buffer
from emitter_anyio._values.channels import check_channel
from emitter_anyio._values.checks import check_function, check_text
from emitter_anyio._values.errors import HandlerError
from emitter_anyio._values.messages import EmitterMessage
from emitter_anyio._values.requests import PresenceEvent
from emitter_anyio._values.router import Routes

from .background import Background
from .guard import Guard
from .slot import Slot
from .totals import Totals

logger = logging.getLogger("emitter_anyio")

_WITH_CHANNEL: Final = ("message", "presence")
_WITHOUT_VALUE: Final = ("connect", "disconnect")
EVENTS: Final = (*_WITHOUT_VALUE, *_WITH_CHANNEL, "keygen", "keyban", "link", "me", "error")


_Listen: TypeAlias = Callable[[str, str | None, str, int, Overflow], Sender[Any]]
"""Opens a stream of an event and a channel, with its name in errors, buffer and policy."""


class _Registration:
    """A handler, its options, and while the client is entered, its stream."""

    def __init__(
        self,
        event: str,
        handler: Callable[..., object],
        channel: str | None,
        buffer: int,
        overflow: Overflow,
    ) -> None:
        self.event = event
        self.handler = handler
        self.channel = channel
        self.send: Sender[Any] | None = None
        self._stream: EventStream[Any] | None = None
        self.task: int | None = None
        """The task that calls the handler, if it has begun."""
        self.leaves = False
        """Whether the handler awaits the end of the client."""
        self._buffer = buffer
        self._overflow: Overflow = overflow

    def start(self, listen: _Listen) -> EventStream[Any]:
        """Open the stream."""
        self.task = None
        self.send = listen(
            self.event, self.channel, f"on({self.event!r})", self._buffer, self._overflow
        )
        self._stream = EventStream(self.send)
        return self._stream

    def begin(self) -> None:
        """Note the task that calls the handler, which is the current one."""
        self.task = anyio.get_current_task().id

    def leave(self, *, leaves: bool) -> None:
        """Note whether the handler awaits the end of the client."""
        self.leaves = leaves

    def stop(self) -> None:
        """Close the stream."""
        if self._stream is not None:
            self._stream.close()
            self.send = self._stream = None


class Events:
    """
    Gives events to handlers and streams.

    :param slot: the client's state
    :param routes: the receivers of each event
    :param background: runs the handlers
    :param guard: calls the handlers
    :param totals: counts what closed streams have dropped
    """

    def __init__(
        self,
        slot: Slot,
        routes: Routes[Receiver[Any]],
        background: Background,
        guard: Guard,
        totals: Totals,
    ) -> None:
        self._slot = slot
        self._owner = slot.owner
        self._routes = routes
        self._background = background
        self._guard = guard
        self._totals = totals
        self._registrations: list[_Registration] = []
        self._started = False
        self._busy: set[_Registration] = set()
        self._less_busy: anyio.Event | None = None
        self._listeners: set[Sender[Any]] = set()
        """Those of handlers and of ``stream()``; other receivers belong to subscriptions."""

    @property
    def busy(self) -> bool:
        """Whether a handler runs or has values to handle."""
        return bool(self._busy)

    def on(
        self,
        event: str,
        handler: Callable[..., object] | None,
        channel: str | None,
        buffer: int,
        overflow: Overflow,
    ) -> Any:
        """Register a handler, or return a decorator that does."""
        event, channel = _check(event, channel, buffer, overflow)

        def register(handler: Callable[..., object]) -> Callable[..., object]:
            check_function("handler", handler)
            self._register(_Registration(event, handler, channel, buffer, overflow))
            return handler

        return register if handler is None else register(handler)

    def off(self, event: str, handler: Callable[..., object]) -> None:
        """Unregister a handler."""
        event = _check_event(event)
        if self._started:
            self._owner.check()
        for registration in self._registrations:
            if registration.event == event and registration.handler == handler:
                self._registrations.remove(registration)
                registration.stop()
                return
        raise ValueError(f"this handler is not registered for {event!r}")

    def stream(
        self, event: str, channel: str | None, buffer: int, overflow: Overflow
    ) -> Entering[EventStream[Any]]:
        """Return a stream of an event, to be entered."""
        event, channel = _check(event, channel, buffer, overflow)
        return Entering(
            self._owner, partial(self._entered_stream, event, channel, buffer, overflow)
        )

    @asynccontextmanager
    async def _entered_stream(
        self, event: str, channel: str | None, buffer: int, overflow: Overflow
    ) -> AsyncGenerator[EventStream[Any]]:
        # If the client is not entered yet, it will be entered in the same event loop.
        self._owner.claim()
        send = self._listen(event, channel, f"stream({event!r})", buffer, overflow)
        try:
            with EventStream[Any](send) as stream:
                yield stream
        finally:
            send.leave()
            self._owner.release()

    # Emitting

    def receivers(self, event: str, value: object) -> tuple[Receiver[Any], ...]:
        """Return the receivers that a value reaches."""
        if isinstance(value, EmitterMessage | PresenceEvent):
            return self._routes.reached(event, value.channel)
        return self._routes.reached(event)

    def message_listeners(self, message: EmitterMessage | None = None) -> tuple[Sender[Any], ...]:
        """Return the handlers' and ``stream()``'s streams of messages, or those of one message."""
        every = self._routes.messages
        found = every if message is None else every.receivers[message.channel]
        return tuple(one for one in found if isinstance(one, Sender) and one in self._listeners)

    def emit(self, event: str, value: object = None) -> None:
        """Give a value to handlers and streams, without waiting for space."""
        for stream in self.receivers(event, value):
            stream.push_or_drop(value)

    def report(self, error: Exception) -> None:
        """Give an error without a caller to ``on("error")``, or log it."""
        if self._routes.reached("error"):
            self.emit("error", error)
        else:
            logger.warning("%s", error)

    # Handlers

    def start(self) -> None:
        """Start the handlers' tasks."""
        self._started = True
        for registration in self._registrations:
            self._start_handler(registration)

    def end(self, *, but: tuple[str, ...] = ()) -> None:
        """Let handlers finish the values that they have, and give them no more."""
        for registration in self._registrations:
            if registration.send is not None and registration.event not in but:
                registration.send.end()

    def stop(self) -> None:
        """Forget the handlers' tasks, which have ended."""
        self._started = False
        self._busy.clear()
        for registration in self._registrations:
            registration.stop()

    async def wait_done(
        self, deadline: float, *, but: tuple[str, ...] = (), leavers: bool = False
    ) -> None:
        """
        Wait until the handlers have finished the values that they have.

        :param deadline: the time until which to wait
        :param but: events whose handlers are not waited for
        :param leavers: whether to wait also for handlers that await the end of the client
        """

        def busy() -> bool:
            return any(one.event not in but and (leavers or not one.leaves) for one in self._busy)

        if busy():
            with anyio.CancelScope(deadline=deadline):
                while busy():
                    if self._less_busy is None:
                        self._less_busy = anyio.Event()
                    await self._less_busy.wait()

    @contextmanager
    def awaiting_end(self) -> Generator[None]:
        """Have closing not wait for the current task's handler, if it is one, which awaits it."""
        task = anyio.get_current_task().id
        waiting = [registration for registration in self._busy if registration.task == task]
        for registration in waiting:
            registration.leave(leaves=True)
            self._be_less_busy()
        try:
            yield
        finally:
            for registration in waiting:
                registration.leave(leaves=False)

    def handles(self, receiver: Receiver[Any]) -> bool:
        """Return whether a receiver is a handler's stream."""
        return any(registration.send is receiver for registration in self._registrations)

    def _register(self, registration: _Registration) -> None:
        if self._started:
            self._owner.check()
        self._registrations.append(registration)
        if self._started:
            self._start_handler(registration)

    def _start_handler(self, registration: _Registration) -> None:
        stream = registration.start(self._listen)
        # Before its task has begun: values that arrive from now on must be handled.
        self._busy.add(registration)
        name = f"emitter_anyio on({registration.event!r})"
        self._background.start_soon(self._run_handler, registration, stream, name=name)

    async def _run_handler(self, registration: _Registration, stream: EventStream[Any]) -> None:
        registration.begin()
        try:
            if not is_cancelled():
                await self._guard.call_with_each(
                    stream,
                    registration.handler,
                    without_value=registration.event in _WITHOUT_VALUE,
                    overflowed=self.report,
                    failed=partial(self._handler_failed, registration.event, registration.handler),
                )
        finally:
            self._busy.discard(registration)
            self._be_less_busy()

    def _handler_failed(
        self, event: str, handler: Callable[..., object], exc: BaseException
    ) -> bool:
        """Give what a handler raised to ``on("error")``, or end the client."""
        name = getattr(handler, "__qualname__", type(handler).__name__)
        # Python replaces StopIteration by a RuntimeError in coroutines.
        raised = exc.__cause__ if isinstance(exc.__cause__, StopIteration) else exc
        error = HandlerError(
            f"the handler {name} of {event!r} raised {type(raised).__name__}", event=event
        )
        error.__cause__ = exc
        if self._slot.will_pass(exc):
            self.report(error)
            return True
        if event == "error" or not self._routes.reached("error"):
            exc.add_note(f"raised by the handler {name} of {event!r}, and nobody handled 'error'")
            self._background.fail(exc)
            return False
        self.emit("error", error)
        return True

    def _be_less_busy(self) -> None:
        if self._less_busy is not None:
            self._less_busy.set()
            self._less_busy = None

    def _listen(
        self, event: str, channel: str | None, what: str, buffer: int, overflow: Overflow
    ) -> Sender[Any]:
        send: Sender[Any] = Sender(what, buffer, overflow, partial(self._unlisten, event))
        self._listeners.add(send)
        self._routes.add(event, send, channel)
        return send

    def _unlisten(self, event: str, send: Sender[Any]) -> None:
        self._listeners.discard(send)
        self._routes.discard(event, send)
        self._totals.leave_stream(send)


def _check(
    event: str, channel: str | None, buffer: int, overflow: Overflow
) -> tuple[str, str | None]:
    event = _check_event(event)
    check_buffer(buffer, overflow)
    if channel is None:
        return event, None
    if event not in _WITH_CHANNEL:
        raise ValueError(f"{event!r} has no channel: channel= goes with message and presence")
    return event, check_channel(channel, wildcards=True)


def _check_event(event: str) -> str:
    event = check_text("event", event)
    if event not in EVENTS:
        raise ValueError(f"there is no event {event!r}; there are {', '.join(EVENTS)}")
    return event
