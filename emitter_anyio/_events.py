"""The ``on()`` registry, its handlers and its streams."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, Literal, TypeAlias, TypedDict, TypeVar, Unpack, overload

import anyio

from ._backend import Owner
from ._buffer import Overflow, check_buffer
from ._channels import check_channel
from ._checks import check_function, check_text
from ._errors import HandlerError, SlowConsumerError
from ._guard import Guard
from ._messages import EmitterMessage
from ._requests import ChannelKey, Link, Me, PresenceEvent
from ._router import Matcher, Router
from ._subscription import Entering, EventStream
from ._tasks import Tasks

logger = logging.getLogger("emitter_anyio")

_WITH_CHANNEL: Final = ("message", "presence")
_WITHOUT_VALUE: Final = ("connect", "disconnect")
EVENTS: Final = (*_WITHOUT_VALUE, *_WITH_CHANNEL, "keygen", "keyban", "link", "me", "error")

_LifeEvent: TypeAlias = Literal["connect", "disconnect"]
_OnLife = TypeVar("_OnLife", bound=Callable[[], object])
_OnMessage = TypeVar("_OnMessage", bound=Callable[[EmitterMessage], object])
_OnPresence = TypeVar("_OnPresence", bound=Callable[[PresenceEvent], object])
_OnKeygen = TypeVar("_OnKeygen", bound=Callable[[ChannelKey], object])
_OnKeyban = TypeVar("_OnKeyban", bound=Callable[[bool], object])
_OnLink = TypeVar("_OnLink", bound=Callable[[Link], object])
_OnMe = TypeVar("_OnMe", bound=Callable[[Me], object])
_OnError = TypeVar("_OnError", bound=Callable[[Exception], object])


class _Options(TypedDict, total=False):
    channel: str | None
    buffer: int
    overflow: Overflow


class _Registration:
    """A handler, what it wants, and, while the client lives, what it has not handled yet."""

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
        self.buffer = buffer
        self.overflow: Overflow = overflow
        self.stream: EventStream[Any] | None = None
        self.task: int | None = None
        self.leaves = False
        """Whether its task waits for the client to be closed."""


class EventSource(ABC):
    """
    What :class:`~emitter_anyio.Emitter` has of ``on()``, ``off()`` and ``stream()``.

    :param matcher: how channels reach those who ask for one
    """

    def __init__(self, matcher: Matcher) -> None:
        self._routers: defaultdict[str, Router[EventStream[Any]]] = defaultdict(
            partial(Router, matcher)
        )
        self._owner = Owner()
        self._registrations: list[_Registration] = []
        self._handler_tasks: Tasks | None = None
        self._busy: set[_Registration] = set()
        self._less_busy: anyio.Event | None = None
        self._listeners: set[EventStream[Any]] = set()
        """The streams of ``on()`` and ``stream()``, where others are of subscriptions."""

    @overload
    def on(self, event: _LifeEvent, handler: _OnLife, **options: Unpack[_Options]) -> _OnLife: ...
    @overload
    def on(
        self, event: Literal["message"], handler: _OnMessage, **options: Unpack[_Options]
    ) -> _OnMessage: ...
    @overload
    def on(
        self, event: Literal["presence"], handler: _OnPresence, **options: Unpack[_Options]
    ) -> _OnPresence: ...
    @overload
    def on(
        self, event: Literal["keygen"], handler: _OnKeygen, **options: Unpack[_Options]
    ) -> _OnKeygen: ...
    @overload
    def on(
        self, event: Literal["keyban"], handler: _OnKeyban, **options: Unpack[_Options]
    ) -> _OnKeyban: ...
    @overload
    def on(
        self, event: Literal["link"], handler: _OnLink, **options: Unpack[_Options]
    ) -> _OnLink: ...
    @overload
    def on(self, event: Literal["me"], handler: _OnMe, **options: Unpack[_Options]) -> _OnMe: ...
    @overload
    def on(
        self, event: Literal["error"], handler: _OnError, **options: Unpack[_Options]
    ) -> _OnError: ...
    @overload
    def on(
        self, event: _LifeEvent, **options: Unpack[_Options]
    ) -> Callable[[_OnLife], _OnLife]: ...
    @overload
    def on(
        self, event: Literal["message"], **options: Unpack[_Options]
    ) -> Callable[[_OnMessage], _OnMessage]: ...
    @overload
    def on(
        self, event: Literal["presence"], **options: Unpack[_Options]
    ) -> Callable[[_OnPresence], _OnPresence]: ...
    @overload
    def on(
        self, event: Literal["keygen"], **options: Unpack[_Options]
    ) -> Callable[[_OnKeygen], _OnKeygen]: ...
    @overload
    def on(
        self, event: Literal["keyban"], **options: Unpack[_Options]
    ) -> Callable[[_OnKeyban], _OnKeyban]: ...
    @overload
    def on(
        self, event: Literal["link"], **options: Unpack[_Options]
    ) -> Callable[[_OnLink], _OnLink]: ...
    @overload
    def on(self, event: Literal["me"], **options: Unpack[_Options]) -> Callable[[_OnMe], _OnMe]: ...
    @overload
    def on(
        self, event: Literal["error"], **options: Unpack[_Options]
    ) -> Callable[[_OnError], _OnError]: ...
    def on(
        self,
        event: str,
        handler: Callable[..., object] | None = None,
        *,
        channel: str | None = None,
        buffer: int = 1024,
        overflow: Overflow = "raise",
    ) -> Any:
        """
        Register a handler, before or after entering; or, without one, decorate it.

        A handler is called with the event's value, and without any for ``connect`` and
        ``disconnect``; what it returns is awaited if it can be. Its calls come in order, in a task
        of the client's; it may await any verb. What it raises goes to ``on("error")`` as
        :class:`HandlerError`; where nobody handles that, it ends the client and leaves bare.

        :param event: ``"connect"``, ``"disconnect"``, ``"message"``, ``"presence"``,
            ``"keygen"``, ``"keyban"``, ``"link"``, ``"me"`` or ``"error"``
        :param handler: a function or coroutine function
        :param channel: for ``message`` and ``presence``: only what this channel reaches; it
            subscribes to nothing
        :param buffer: how many values may wait for the handler
        :param overflow: what happens to more; a :class:`SlowConsumerError` goes to ``on("error")``
        :return: the handler
        :raises TypeError: if an argument has the wrong type, or the handler is a generator function
        :raises ValueError: if there is no such event
        :raises WrongLoopError: once the client is entered, in another thread or event loop
        """
        event, channel = _check(event, channel, buffer, overflow)

        def register(handler: Callable[..., object]) -> Callable[..., object]:
            check_function("handler", handler)
            self._register(_Registration(event, handler, channel, buffer, overflow))
            return handler

        return register if handler is None else register(handler)

    def off(self, event: str, handler: Callable[..., object]) -> None:
        """
        Take a handler away; what waits for it is dropped.

        :raises ValueError: if it is not registered for this event
        :raises WrongLoopError: once the client is entered, in another thread or event loop
        """
        event = _check_event(event)
        if self._handler_tasks is not None:
            self._owner.check()
        for registration in self._registrations:
            if registration.event == event and registration.handler == handler:
                self._registrations.remove(registration)
                if registration.stream is not None:
                    self._unlisten(registration.stream, event)
                return
        raise ValueError(f"this handler is not registered for {event!r}")

    @overload
    def stream(
        self, event: _LifeEvent, **options: Unpack[_Options]
    ) -> Entering[EventStream[None]]: ...
    @overload
    def stream(
        self, event: Literal["message"], **options: Unpack[_Options]
    ) -> Entering[EventStream[EmitterMessage]]: ...
    @overload
    def stream(
        self, event: Literal["presence"], **options: Unpack[_Options]
    ) -> Entering[EventStream[PresenceEvent]]: ...
    @overload
    def stream(
        self, event: Literal["keygen"], **options: Unpack[_Options]
    ) -> Entering[EventStream[ChannelKey]]: ...
    @overload
    def stream(
        self, event: Literal["keyban"], **options: Unpack[_Options]
    ) -> Entering[EventStream[bool]]: ...
    @overload
    def stream(
        self, event: Literal["link"], **options: Unpack[_Options]
    ) -> Entering[EventStream[Link]]: ...
    @overload
    def stream(
        self, event: Literal["me"], **options: Unpack[_Options]
    ) -> Entering[EventStream[Me]]: ...
    @overload
    def stream(
        self, event: Literal["error"], **options: Unpack[_Options]
    ) -> Entering[EventStream[Exception]]: ...
    def stream(
        self,
        event: str,
        *,
        channel: str | None = None,
        buffer: int = 1024,
        overflow: Overflow = "raise",
    ) -> Any:
        """
        Give what a handler would be given as a stream, entered with ``async with``.

        :param event: as in :meth:`on`
        :param channel: for ``message`` and ``presence``: only what this channel reaches; it
            subscribes to nothing
        :param buffer: how many values may wait in the stream
        :param overflow: what happens to more
        :return: to be entered, for an :class:`EventStream`
        :raises ValueError: if there is no such event
        """
        event, channel = _check(event, channel, buffer, overflow)
        return Entering(
            self._owner, partial(self._entered_stream, event, channel, buffer, overflow)
        )

    @asynccontextmanager
    async def _entered_stream(
        self, event: str, channel: str | None, buffer: int, overflow: Overflow
    ) -> AsyncGenerator[EventStream[Any]]:
        # Before the client is entered, too: it is then entered in the same event loop.
        self._owner.claim()
        stream: EventStream[Any] = EventStream(f"stream({event!r})", buffer, overflow)
        self._listen(stream, event, channel)
        try:
            yield stream
        finally:
            self._unlisten(stream, event)
            self._owner.release()

    # For the client

    def _receivers(self, event: str, value: object) -> tuple[EventStream[Any], ...]:
        # An event without a channel reaches those who ask for everything: they all do.
        router = self._routers.get(event)
        if router is None:
            return ()
        channel = value.channel if isinstance(value, EmitterMessage | PresenceEvent) else "/"
        return router.receivers[channel]

    def _handler_streams(self, event: str, value: object) -> list[EventStream[Any]]:
        """Give the streams of ``on()`` and ``stream()`` that a value reaches."""
        return [stream for stream in self._receivers(event, value) if stream in self._listeners]

    def _emit(self, event: str, value: object = None) -> None:
        for stream in self._receivers(event, value):
            stream.push_or_drop(value)

    def _report(self, error: Exception) -> None:
        """Give an error that nobody waits for to ``on("error")``, or log it."""
        if self._receivers("error", error):
            self._emit("error", error)
        else:
            logger.warning("%s", error)

    def _start_handlers(self, tasks: Tasks) -> None:
        self._handler_tasks = tasks
        for registration in self._registrations:
            self._start_handler(registration)

    def _end_handlers(self, *, but: tuple[str, ...] = ()) -> None:
        """Let handlers finish what waits for them, and take nothing more."""
        for registration in self._registrations:
            if registration.stream is not None and registration.event not in but:
                registration.stream.end()

    def _stop_handlers(self) -> None:
        self._handler_tasks = None
        self._busy.clear()
        for registration in self._registrations:
            if registration.stream is not None:
                self._unlisten(registration.stream, registration.event)
                registration.stream = None

    async def _handlers_done(
        self, deadline: float, *, but: tuple[str, ...] = (), leavers: bool = False
    ) -> None:
        """
        Wait until the handlers have finished what waits for them.

        :param deadline: until when to wait
        :param but: events whose handlers are not waited for
        :param leavers: whether to wait for those too that wait for the client to be closed
        """

        def busy() -> bool:
            return any(one.event not in but and (leavers or not one.leaves) for one in self._busy)

        if busy():
            with anyio.CancelScope(deadline=deadline):
                while busy():
                    if self._less_busy is None:
                        self._less_busy = anyio.Event()
                    await self._less_busy.wait()

    def _be_less_busy(self) -> None:
        if self._less_busy is not None:
            self._less_busy.set()
            self._less_busy = None

    def _handler_leaves(self) -> None:
        """Note that the present task waits for the client to be closed, if it is a handler's."""
        task = anyio.get_current_task().id
        for one in self._busy:
            if one.task == task:
                one.leaves = True
                self._be_less_busy()

    def _listen(self, stream: EventStream[Any], event: str, channel: str | None) -> None:
        self._listeners.add(stream)
        self._routers[event].add(stream, channel)

    def _unlisten(self, stream: EventStream[Any], event: str) -> None:
        self._listeners.discard(stream)
        self._routers[event].discard(stream)
        self._leave_stream(stream)

    @abstractmethod
    def _leave_stream(self, stream: EventStream[Any]) -> None:
        """Close a stream, and keep what is to be known of it."""

    @abstractmethod
    def _passes(self, error: BaseException) -> bool:
        """Tell whether a handler's exception is about something that will soon be over."""

    @abstractmethod
    def _fail(self, error: BaseException) -> None:
        """End the client because of an error that nobody handles."""

    def _register(self, registration: _Registration) -> None:
        if self._handler_tasks is None:
            self._registrations.append(registration)
        else:
            self._owner.check()
            self._registrations.append(registration)
            self._start_handler(registration)

    def _start_handler(self, registration: _Registration) -> None:
        assert self._handler_tasks is not None
        stream = registration.stream = EventStream(
            f"on({registration.event!r})", registration.buffer, registration.overflow
        )
        self._listen(stream, registration.event, registration.channel)
        # From now on, though its task has yet to begin: what has come for it is not to be lost.
        registration.task, registration.leaves = None, False
        self._busy.add(registration)
        self._handler_tasks.start_soon(
            self._run_handler,
            registration,
            stream,
            name=f"emitter_anyio on({registration.event!r})",
        )

    async def _run_handler(self, registration: _Registration, stream: EventStream[Any]) -> None:
        registration.task = anyio.get_current_task().id
        try:
            await self._handle(registration, stream)
        finally:
            self._busy.discard(registration)
            self._be_less_busy()

    async def _handle(self, registration: _Registration, stream: EventStream[Any]) -> None:
        event, handler = registration.event, registration.handler
        arguments = () if event in _WITHOUT_VALUE else (None,)
        guard = Guard()
        while True:
            try:
                value = await stream.__anext__()  # anext() would be one more call
            except StopAsyncIteration:
                return
            except SlowConsumerError as exc:
                self._report(exc)
                continue
            if arguments:
                arguments = (value,)
            try:
                result = handler(*arguments)
                if result is not None and inspect.isawaitable(result):
                    await result
            except BaseException as exc:
                if not guard.is_of_user(exc):
                    raise
                if not self._handled(event, handler, exc):
                    self._fail(exc)
                    return

    def _handled(self, event: str, handler: Callable[..., object], exc: BaseException) -> bool:
        """Give what a handler has raised to those of ``on("error")``, if there are any."""
        name = getattr(handler, "__qualname__", type(handler).__name__)
        error = HandlerError(
            f"the handler {name} of {event!r} raised {type(exc).__name__}", event=event
        )
        error.__cause__ = exc
        if self._passes(exc):
            self._report(error)
            return True
        if event == "error" or not self._receivers("error", error):
            exc.add_note(f"raised by the handler {name} of {event!r}, and nobody handled 'error'")
            return False
        self._emit("error", error)
        return True


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
