"""Events: handlers registered with ``on()``, their tasks, and streams of events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Final, TypeAlias

import anyio

from emitter_anyio._backend.tasks import is_cancelled
from emitter_anyio._streams import Entering, EventStream, Overflow, Receiver, Sender, check_buffer
from emitter_anyio._values.checks import check_function, check_text
from emitter_anyio._values.errors import HandlerError
from emitter_anyio._values.messages import EmitterMessage
from emitter_anyio._values.requests import PresenceEvent
from emitter_anyio._values.router import Routes, check_delivered
from emitter_anyio._values.templates import Channel, check_pattern

from .background import Background
from .guard import Guard
from .slot import Slot
from .totals import Totals

logger = logging.getLogger("emitter_anyio")

_WITH_CHANNEL: Final = ("message", "presence")
_WITHOUT_VALUE: Final = ("connect", "disconnect")
EVENTS: Final = (*_WITHOUT_VALUE, *_WITH_CHANNEL, "keygen", "keyban", "link", "me", "error")


_Listen: TypeAlias = Callable[[str, str | None, str, int, Overflow], Sender[Any]]
"""Opens a stream: event, channel, name for errors, buffer size and overflow policy."""


class _Registration:
    """A handler with its options and, while the client is entered, its stream."""

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
        """The id of the task that calls the handler, if the task has started."""
        self.awaits_end = False
        """Whether the handler awaits the end of the client."""
        self._buffer = buffer
        self._overflow: Overflow = overflow

    def start(self, listen: _Listen) -> EventStream[Any]:
        """Open the stream; return its receive end."""
        self.task = None
        self.send = listen(
            self.event, self.channel, f"on({self.event!r})", self._buffer, self._overflow
        )
        self._stream = EventStream(self.send)
        return self._stream

    def begin(self) -> None:
        """Record the current task, which calls the handler."""
        self.task = anyio.get_current_task().id

    def set_awaits_end(self, *, awaits_end: bool) -> None:
        """Record whether the handler awaits the end of the client."""
        self.awaits_end = awaits_end

    def stop(self) -> None:
        """Close the stream."""
        if self._stream is not None:
            self._stream.close()
            self.send = self._stream = None


class Events:
    """
    Passes events to handlers and streams.

    :param slot: the state of the client
    :param routes: the receivers of each event
    :param background: runs the handlers
    :param guard: calls the handlers
    :param totals: counts the items that closed streams have dropped
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
        """The streams of handlers and of ``stream()``, as opposed to those of subscriptions."""

    @property
    def busy(self) -> bool:
        """Whether any handler's task is running."""
        return bool(self._busy)

    def on(
        self,
        event: str,
        handler: Callable[..., object] | None,
        channel: str | Channel | None,
        buffer: int,
        overflow: Overflow,
    ) -> Callable[..., object]:
        """Register a handler, or return a decorator that registers one."""
        event, channel = self._check(event, channel, buffer, overflow)

        def register(handler: Callable[..., object]) -> Callable[..., object]:
            check_function("handler", handler)
            self._register(_Registration(event, handler, channel, buffer, overflow))
            return handler

        return register if handler is None else register(handler)

    def off(self, event: str, handler: Callable[..., object]) -> None:
        """
        Unregister a handler.

        :raises ValueError: if it is not registered for the event
        """
        event = _check_event(event)
        if self._started:
            self._owner.check()
        for registration in self._registrations:
            if registration.event == event and registration.handler == handler:
                self._registrations.remove(registration)
                registration.stop()
                return
        raise ValueError(f"cannot unregister the handler: it is not registered for {event!r}")

    def stream(
        self, event: str, channel: str | Channel | None, buffer: int, overflow: Overflow
    ) -> Entering[EventStream[Any]]:
        """Return a context manager that opens a stream of an event."""
        event, channel = self._check(event, channel, buffer, overflow)
        return Entering(
            self._owner, partial(self._entered_stream, event, channel, buffer, overflow)
        )

    @asynccontextmanager
    async def _entered_stream(
        self, event: str, channel: str | None, buffer: int, overflow: Overflow
    ) -> AsyncGenerator[EventStream[Any]]:
        # A client that is not entered yet has to be entered in this event loop.
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
        """Return the receivers that get a value of an event."""
        if isinstance(value, EmitterMessage | PresenceEvent):
            return self._routes.reached(event, value.channel)
        return self._routes.reached(event)

    def message_listeners(self, message: EmitterMessage | None = None) -> tuple[Sender[Any], ...]:
        """Return the streams of handlers and of ``stream()`` that get messages, or one message."""
        every = self._routes.messages
        found = every if message is None else every.receivers[message.channel]
        return tuple(one for one in found if isinstance(one, Sender) and one in self._listeners)

    def emit(self, event: str, value: object = None) -> None:
        """Pass a value to handlers and streams without waiting; a full buffer drops an item."""
        for stream in self.receivers(event, value):
            stream.push_or_drop(value)

    def report(self, error: Exception) -> None:
        """Pass an error that no call can raise to ``on("error")``, or log it as a warning."""
        if self._routes.reached("error"):
            self.emit("error", error)
        else:
            logger.warning("%s", error)

    # Handlers

    def start(self) -> None:
        """Start the tasks of all handlers."""
        self._started = True
        for registration in self._registrations:
            self._start_handler(registration)

    def end(self, *, but: tuple[str, ...] = ()) -> None:
        """Stop passing values to handlers; they still handle what is buffered."""
        for registration in self._registrations:
            if registration.send is not None and registration.event not in but:
                registration.send.end()

    def stop(self) -> None:
        """Close the streams of all handlers, whose tasks have ended."""
        self._started = False
        self._busy.clear()
        for registration in self._registrations:
            registration.stop()

    async def wait_done(
        self, deadline: float, *, but: tuple[str, ...] = (), awaiting_end: bool = False
    ) -> None:
        """
        Wait until the tasks of handlers have ended.

        :param deadline: the time until which to wait at most
        :param but: events whose handlers are not awaited
        :param awaiting_end: whether to include handlers that await the end of the client
        """

        def busy() -> bool:
            return any(
                one.event not in but and (awaiting_end or not one.awaits_end) for one in self._busy
            )

        if busy():
            with anyio.CancelScope(deadline=deadline):
                while busy():
                    if self._less_busy is None:
                        self._less_busy = anyio.Event()
                    await self._less_busy.wait()

    @contextmanager
    def awaiting_end(self) -> Generator[None]:
        """If a handler is calling, have closing not wait for it."""
        task = anyio.get_current_task().id
        waiting = [registration for registration in self._busy if registration.task == task]
        for registration in waiting:
            registration.set_awaits_end(awaits_end=True)
            self._be_less_busy()
        try:
            yield
        finally:
            for registration in waiting:
                registration.set_awaits_end(awaits_end=False)

    def handles(self, receiver: Receiver[Any]) -> bool:
        """Return whether a receiver is the stream of a handler."""
        return any(registration.send is receiver for registration in self._registrations)

    def _register(self, registration: _Registration) -> None:
        if self._started:
            self._owner.check()
        self._registrations.append(registration)
        if self._started:
            self._start_handler(registration)

    def _start_handler(self, registration: _Registration) -> None:
        stream = registration.start(self._listen)
        # The handler is busy before its task starts: values that arrive from now on are for it.
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
        """
        Pass the exception of a handler to ``on("error")``, or end the client with it.

        :return: whether the handler gets further values
        """
        name = getattr(handler, "__qualname__", type(handler).__name__)
        # In coroutines, Python replaces StopIteration with a RuntimeError.
        raised = exc.__cause__ if isinstance(exc.__cause__, StopIteration) else exc
        error = HandlerError(
            f"the handler {name} of {event!r} raised {type(raised).__name__}", event=event
        )
        error.__cause__ = exc
        if self._slot.is_transient(exc):
            self.report(error)
            return True
        if event == "error" or not self._routes.reached("error"):
            exc.add_note(
                f"raised by the handler {name} of {event!r}; no handler of 'error' took it"
            )
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

    def _check(
        self, event: str, channel: str | Channel | None, buffer: int, overflow: Overflow
    ) -> tuple[str, str | None]:
        event = _check_event(event)
        check_buffer(buffer, overflow)
        if channel is None:
            return event, None
        if event not in _WITH_CHANNEL:
            raise ValueError(
                f"cannot use channel with {event!r}: only 'message' and 'presence' have channels"
            )
        pattern = check_pattern(channel)
        check_delivered(pattern, self._routes.matcher)
        return event, pattern

    def _unlisten(self, event: str, send: Sender[Any]) -> None:
        self._listeners.discard(send)
        self._routes.discard(event, send)
        self._totals.leave_stream(send)


def _check_event(event: str) -> str:
    event = check_text("event", event)
    if event not in EVENTS:
        raise ValueError(f"unknown event {event!r}: expected one of {', '.join(EVENTS)}")
    return event
