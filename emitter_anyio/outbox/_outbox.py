"""The public class of the outbox."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, NoReturn, Self, TypeAlias, cast, get_args

import anyio
from anyio import CancelScope

from emitter_anyio._backend.interrupts import uninterrupted
from emitter_anyio._backend.tasks import Tasks, is_cancelled
from emitter_anyio._client import Emitter
from emitter_anyio._features.pipeline import pipeline_of
from emitter_anyio._values.channels import PLACEHOLDER_KEY, ChannelKey, check_channel, check_key
from emitter_anyio._values.checks import (
    check_choice,
    check_flag,
    check_function,
    check_int,
    check_optional_int,
    check_seconds,
)
from emitter_anyio._values.errors import ClosedError
from emitter_anyio._values.messages import Payload

from ._journal import Journal
from ._sender import KeyOfChannel, Sender
from ._store import Overflow, Store
from ._values import OutboxError, OutboxStatistics, ParkedMessage, Record

OutboxKey: TypeAlias = str | ChannelKey | Callable[[str], Awaitable[str | ChannelKey]]
"""A key for an :class:`Outbox`; a function is called with a channel and returns its key."""

DEFAULT_MAX_SIZE: Final = 64 * 1024 * 1024
DEFAULT_MAX_AGE: Final = 7 * 24 * 3600.0
_MAX_SIZE: Final = 2**63 - 1


class Outbox:
    """
    A file that stores messages until the broker has accepted them.

    The outbox is an asynchronous context manager. Enter it before or after its client, in the same
    event loop; leave them in any order. While the client is connected, the outbox publishes the
    messages with QoS 1, in order for each channel, with many in flight. It deletes a message when
    the broker has accepted it. If the outcome of a message is unknown, the outbox publishes it
    again, so it might arrive twice.

    If the broker refuses a message, the outbox parks it, and the client emits ``error`` with a
    :class:`MessageParkedError`. Parked messages do not delay others. If messages become too old,
    the outbox gives them up, counts them, and the client emits ``error`` with a
    :class:`MessagesGivenUpError`. Without a handler for ``error``, or if the client is not entered,
    both are logged as warnings.

    While the client is connected, leaving the block sends the waiting messages, for at most the
    client's ``disconnect_timeout``. A client that disconnects waits for its outboxes in the same
    way. Messages that are not accepted by then stay in the file.

    :param path: the path of the file, which is created if it does not exist, readable only by its
        owner. Its directory must exist. SQLite stores a log next to it
    :param emitter: the client
    :param key: a key with the permission to write (``w``), or an ``async`` function that is called
        with a channel and returns its key, as for :class:`~emitter_anyio.Emitter`. The key is not
        written to the file
    :param max_size: the maximum number of bytes of all messages. Each message counts as its
        payload, its channel and 128 bytes
    :param max_age: the number of seconds after which messages are given up; ``None``: never
    :param overflow: the policy when the outbox is full. ``"raise"``: :meth:`publish` raises
        :class:`OutboxFullError`. ``"drop_oldest"``: it gives up the oldest messages
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if an argument is out of range, or the key is malformed
    :raises OutboxInUseError: when entered, if another outbox uses the file
    :raises OutboxError: when entered, if the file cannot be opened, read or written, belongs to
        another program, or has a newer format
    :raises RuntimeError: if the outbox is already entered
    :raises WrongLoopError: if it is entered or left in a different event loop than the client

    If the file is corrupt, the outbox renames it and begins with a new one, and the client emits
    ``error``; see :attr:`set_aside`.

    If the block is cancelled, leaving it waits only for the current write to the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        emitter: Emitter,
        key: OutboxKey,
        *,
        max_size: int = DEFAULT_MAX_SIZE,
        max_age: float | None = DEFAULT_MAX_AGE,
        overflow: Overflow = "raise",
    ) -> None:
        self._path = _check_path(path)
        if not isinstance(emitter, Emitter):
            raise TypeError(f"emitter must be an Emitter, not {type(emitter).__name__}")
        self._key = _check_key(key)
        self._max_size = check_int("max_size", max_size, 1024, _MAX_SIZE, " bytes")
        self._max_age = math.inf if max_age is None else check_seconds("max_age", max_age)
        self._overflow: Overflow = cast(
            "Overflow", check_choice("overflow", overflow, get_args(Overflow))
        )
        self._pipeline = pipeline_of(emitter)
        self._owner = self._pipeline.owner
        self._size_key = self._key if isinstance(self._key, str) else PLACEHOLDER_KEY
        self._store: Store
        self._journal: Journal
        self._sender: Sender
        self._tasks: Tasks | None = None
        self._stop_tasks: Callable[[], None]
        self._entered = False
        self._open = False
        """Whether calls may use the file."""
        self._stopped = False
        """Whether a task has failed or was cancelled."""
        self._failure: BaseException | None = None
        self._set_aside: Path | None = None

    def __repr__(self) -> str:
        return f"<Outbox {self._path!r}>"

    # Messages

    async def publish(
        self,
        channel: str,
        message: Payload,
        ttl: int | None = None,
        *,
        retain: bool = False,
        echo: bool = True,
    ) -> None:
        """
        Store a message, and return when it is on disk. This does not require a connection.

        Concurrent calls share a transaction, which is much faster than one call after another.

        :param channel: the channel, without wildcards
        :param message: bytes-like, or ``str`` (sent as UTF-8); any other object is sent as JSON
        :param ttl: seconds for which the message is valid, counted from this call. The broker
            stores it for this time, minus the time that it has waited in the outbox. If no time
            is left, it is given up. ``None`` or 0: the broker does not store the message
        :param retain: as for :meth:`~emitter_anyio.Emitter.publish`
        :param echo: as for :meth:`~emitter_anyio.Emitter.publish`
        :raises TypeError: if an argument has the wrong type, or JSON cannot encode the message
        :raises ValueError: if an argument is out of range, or the message is malformed
        :raises InvalidChannelError: if the broker would not accept the channel
        :raises MessageTooLargeError: if the packet would exceed ``max_message_size`` of the client
        :raises OutboxFullError: if the outbox is full
        :raises OutboxError: if the file could not be written, for example because the disk is full
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop

        If cancelled before it is written, the message is not stored. If cancelled while it is being
        written, it might be stored, but never in part.
        """
        channel, ttl = check_channel(channel), check_optional_int("ttl", ttl) or None
        retain, echo = check_flag("retain", retain), check_flag("echo", echo)
        payload = self._pipeline.encode(message)
        self._pipeline.check(self._size_key, channel, payload, ttl, echo)
        await self._opened().write(Record(channel, payload, ttl, retain, echo))

    async def parked(self) -> list[ParkedMessage]:
        """
        Return the messages that the broker has refused, oldest first.

        :raises OutboxError: if the file could not be read
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop
        """
        return await self._opened().call(self._store.parked)

    async def retry(self, messages: Iterable[ParkedMessage] | None = None) -> int:
        """
        Publish parked messages again, after the waiting messages.

        :param messages: messages from :meth:`parked`; ``None``: all
        :return: the number of messages, without those that are no longer parked
        :raises TypeError: if ``messages`` has the wrong type
        :raises OutboxError: if the file could not be written
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop

        If cancelled, either all of the messages are retried or none.
        """
        ids = None if messages is None else _ids(messages)
        return await self._opened().call(partial(self._store.retry, ids))

    async def drop(self, messages: Iterable[ParkedMessage]) -> int:
        """
        Delete parked messages.

        :param messages: messages from :meth:`parked`
        :return: the number of messages, without those that are no longer parked
        :raises TypeError: if ``messages`` has the wrong type
        :raises OutboxError: if the file could not be written
        :raises ClosedError: outside the block
        :raises WrongLoopError: in another thread or event loop

        If cancelled, either all of the messages are deleted or none.
        """
        ids = _ids(messages)
        return await self._opened().call(partial(self._store.drop, ids))

    def statistics(self) -> OutboxStatistics:
        """
        Return the figures of the outbox. Any thread can call it.

        :raises ClosedError: outside the block
        """
        if not self._open:
            raise self._closed()
        return self._journal.statistics()

    @property
    def set_aside(self) -> Path | None:
        """The path to which a corrupt file was renamed when the outbox was entered, or ``None``."""
        return self._set_aside

    # Entering and leaving

    if not TYPE_CHECKING:
        # Type checkers reject these uses because the methods do not exist for them.

        def __enter__(self) -> NoReturn:
            raise TypeError("cannot enter an Outbox with 'with'; write 'async with Outbox(...)'")

        def __exit__(self, *_: object) -> None:
            """Exist, because ``with`` looks it up before it calls ``__enter__()``."""

    @uninterrupted
    async def __aenter__(self) -> Self:
        if self._entered:
            self._owner.check()
            raise RuntimeError("cannot enter the outbox: it is already entered; leave it first")
        # A client that is not entered yet must be entered in this event loop.
        self._owner.claim()
        self._entered = True
        self._store = store = Store(self._path, self._max_size, self._max_age, self._overflow)
        self._sender = sender = Sender(self._pipeline, self._key, self._max_age)
        callbacks = self._pipeline.report, sender.wanted, sender.fetched, sender.update
        self._journal = journal = Journal(store, self._path, *callbacks)
        tasks = Tasks(self._task_failed)
        try:
            self._note_corrupt(await journal.open())
            await tasks.open()
        except BaseException:
            try:
                with CancelScope(shield=True):
                    await journal.close()
            finally:
                self._release()
            raise
        self._failure, self._stopped = None, False
        self._tasks, self._stop_tasks, self._open = tasks, tasks.stop, True
        tasks.start_soon(journal.run, name="emitter_anyio outbox: file")
        sender.start(journal, tasks)
        return self

    @uninterrupted
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Returns None, not bool, so that type checkers know that it suppresses no exception.
        self._owner.check()
        tasks = self._tasks
        if tasks is None:
            raise RuntimeError("cannot leave the outbox: it is not entered")
        try:
            if self._open:
                self._open = False
                await self._end(tasks, exc)
        finally:
            if tasks.hosted_here:
                self._release()
                await _close(tasks, exc)
            elif tasks.host_ended:
                self._release()
        if self._tasks is not None:
            raise RuntimeError(
                "cannot leave the outbox in another task than the one that entered it, which is "
                "still running: the file is closed, but the first task must leave, too; use "
                "'async with' in one task"
            ) from exc
        if self._failure is not None:
            if exc is None:
                raise self._failure
            exc.add_note(f"the outbox {self._path!r} also failed: {self._failure!r}")

    async def _end(self, tasks: Tasks, exc: BaseException | None) -> None:
        """Send waiting messages, unless the block is cancelled; stop the tasks; close the file."""
        cancelled = isinstance(exc, anyio.get_cancelled_exc_class()) or is_cancelled()
        try:
            if not (self._stopped or cancelled):
                with anyio.move_on_after(self._pipeline.disconnect_timeout):
                    await self._sender.wait_sent()
        finally:
            with CancelScope(shield=True):
                try:
                    tasks.stop()
                    await tasks.stopped()
                finally:
                    try:
                        await self._journal.close()
                    finally:
                        self._sender.stop()

    def _note_corrupt(self, aside: str | None) -> None:
        """Report the path to which a corrupt file was renamed, if there was one."""
        self._set_aside = None if aside is None else Path(aside)
        if aside is not None:
            self._pipeline.report(
                OutboxError(
                    f"the outbox {self._path!r} was corrupt: the file was renamed to {aside!r}, "
                    "and a new one was created"
                )
            )

    def _release(self) -> None:
        self._tasks, self._entered = None, False
        self._owner.release()

    def _task_failed(self, error: BaseException) -> None:
        """Stop, because a task has failed, or was cancelled with ``Task.cancel()``."""
        if not isinstance(error, anyio.get_cancelled_exc_class()):
            self._failure = self._failure or error
        self._stopped = True
        stopped = OutboxError(
            f"the outbox {self._path!r} has stopped, because one of its tasks failed or was "
            "cancelled"
        )
        stopped.__cause__ = self._failure
        self._journal.end(stopped)
        self._stop_tasks()

    def _opened(self) -> Journal:
        """Return the journal, which reads and writes the file."""
        self._owner.check()
        if not self._open:
            raise self._closed()
        return self._journal

    def _closed(self) -> ClosedError:
        return ClosedError(
            f"the outbox {self._path!r} is not entered: use it inside 'async with Outbox(...) as "
            "box:'"
        )


async def _close(tasks: Tasks, exc: BaseException | None) -> None:
    """
    Close the task group.

    :param exc: the exception of the block, which leaves it even if the block is cancelled
    """
    try:
        await tasks.close()
    except anyio.get_cancelled_exc_class():
        if exc is None:
            raise


def _check_path(path: object) -> str:
    """
    Check a path.

    :return: the path as a plain ``str``
    :raises TypeError: if it is neither a ``str`` nor a path object that contains one
    :raises ValueError: if it is empty or contains NUL
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str):
        raise TypeError(f"path must be a str or a path object, not {type(path).__name__}")
    if not text or "\0" in text:
        raise ValueError(f"invalid path {text!r}: it is empty or contains NUL")
    return str.__str__(text)


def _check_key(key: OutboxKey) -> str | KeyOfChannel:
    """
    Check a key, or a function that returns the key of a channel.

    :raises TypeError: if it is neither, or a function that does not take one argument
    :raises ValueError: if the key contains an invalid character
    """
    if isinstance(key, str | ChannelKey) or not callable(key):
        return check_key(key)
    # The function must be hashable, because it is part of a dict key.
    hash(check_function("key", key))
    try:
        signature = inspect.signature(key)
    except ValueError:  # some C functions have no signature
        return key
    try:
        signature.bind("a/")
    except TypeError as exc:
        raise TypeError(f"key must be a function that takes a channel: {exc}") from None
    return key


def _ids(messages: Iterable[ParkedMessage]) -> list[int]:
    if isinstance(messages, Iterable):
        found = list(messages)
        if all(isinstance(message, ParkedMessage) for message in found):
            return [message.id for message in found]
    raise TypeError("messages must be ParkedMessage objects, as parked() returns them")
