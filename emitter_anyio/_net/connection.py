"""A connection: reading, writing, keepalive and orderly closing."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from typing import Final, TypeAlias

import anyio

from emitter_anyio._backend import READ_CHUNK_BYTES, current_backend
from emitter_anyio._backend.tasks import Tasks, is_cancelled
from emitter_anyio._protocol.codec import Codec
from emitter_anyio._protocol.fast_path import is_qos_0_publish
from emitter_anyio._protocol.packets import Disconnect, Event, Packet
from emitter_anyio._protocol.session import Session
from emitter_anyio._protocol.wants import Wants
from emitter_anyio._values.batches import MessageBatch
from emitter_anyio._values.errors import RemoteProtocolError

from .keepalive import Keepalive
from .options import Options, Server
from .timer import ReplyDeadline, Timer
from .transport import Transport
from .writer import Writer

Deliver: TypeAlias = Callable[[Sequence[Event]], Awaitable[None]]

_MAX_READ_BYTES: Final = 262144
"""The maximum read size while reads are filled, in bytes."""

_PUBACK_BYTES: Final = 4
_MAX_PACKET_IDS: Final = 65535
"""The maximum number of unacknowledged QoS 1 messages, because each has its own packet id."""


class ConnectionState(Enum):
    """The state of a connection that the broker has acknowledged."""

    OPENING = "opening"
    OPEN = "open"
    DRAINING = "draining"
    DISCARDING = "discarding"
    ENDED = "ended"


_DISCARDING: Final = ConnectionState.DISCARDING
_ENDED: Final = ConnectionState.ENDED


class ConnectionStep(Enum):
    """An event that changes the state of a connection."""

    RUN = "its tasks are started"
    DISCONNECT = "DISCONNECT is queued, and nothing is sent after it"
    DISCARD = "received packets are no longer delivered"
    END = "it has ended, or is about to"


CONNECTION_TRANSITIONS: Final[Mapping[tuple[ConnectionState, ConnectionStep], ConnectionState]] = {
    (ConnectionState.OPENING, ConnectionStep.RUN): ConnectionState.OPEN,
    (ConnectionState.OPENING, ConnectionStep.DISCONNECT): ConnectionState.DRAINING,
    (ConnectionState.OPEN, ConnectionStep.DISCONNECT): ConnectionState.DRAINING,
    (ConnectionState.DRAINING, ConnectionStep.DISCARD): ConnectionState.DISCARDING,
    (ConnectionState.OPENING, ConnectionStep.END): ConnectionState.ENDED,
    (ConnectionState.OPEN, ConnectionStep.END): ConnectionState.ENDED,
    (ConnectionState.DRAINING, ConnectionStep.END): ConnectionState.ENDED,
    (ConnectionState.DISCARDING, ConnectionStep.END): ConnectionState.ENDED,
}
"""A step that is not listed for a state does not change it."""


class Connection:
    """
    A connection that the broker has acknowledged.

    :param server: the server
    :param transport: sends and receives bytes
    :param codec: encodes and decodes packets
    :param first: the events that were decoded together with CONNACK
    :param options: the options of the client
    :param wants: the subscriptions and presence feeds of the client
    """

    def __init__(
        self,
        server: Server,
        transport: Transport,
        codec: Codec,
        first: list[Event],
        options: Options,
        wants: Wants,
    ) -> None:
        self.server = server
        self.since = datetime.now(UTC)
        backend = current_backend()
        self.make_wakeup = backend.make_wakeup
        self._pause = backend.pause
        self.timer = Timer(backend.clock)
        self.writer = Writer(transport, backend.clock, backend.pause)
        self.session = Session(wants, self.send, self.writer.write, codec.encode_publish)
        self.state = ConnectionState.OPENING
        self.read_by_broker = False
        """Whether the broker closed the connection after DISCONNECT, and so has read everything."""
        self._transport = transport
        self._codec = codec
        self._last_heard = transport.last_heard
        """When bytes last arrived, or the reader last waited for a consumer."""
        self._reading_paused = False
        """Whether the reader waits for a consumer, so that missing bytes mean nothing."""
        self._first = first
        self._unsent_pubacks: deque[int] = deque()
        """For each unsent PUBACK, the value of ``writer.sent`` at which it is sent."""
        self._reads = 0
        self._awaits_bytes = False
        self._options = options
        self._waiting: anyio.CancelScope | None = None
        """The scope in which the reader waits for a consumer."""
        self._writing: tuple[anyio.CancelScope, anyio.Event] | None = None
        """The scope of the writer task and the event of its end, while there is one."""
        self._broken: Exception | None = None

    @property
    def leaving(self) -> bool:
        """Whether DISCONNECT is queued, and nothing is sent after it."""
        return self.writer.ended

    @property
    def broken(self) -> bool:
        """Whether the connection has ended, or is about to, for another reason than a close."""
        return self._broken is not None

    @property
    def unsent(self) -> list[bytes]:
        """The QoS 0 publishes that have not been sent, not even in part."""
        return [bytes(one) for one in self.writer.unsent_packets if is_qos_0_publish(one)]

    def send(self, packet: Packet) -> None:
        """Queue a packet; do nothing after DISCONNECT."""
        if self.writer.ended:
            return
        data = self._codec.encode(packet)
        if type(packet) is Disconnect:
            self.writer.write_last(data)
            self._transition(ConnectionStep.DISCONNECT)
        else:
            self.writer.write(data)

    async def run(self, deliver: Deliver, tasks: Tasks) -> Exception | None:
        """
        Run the connection until it breaks or :meth:`close` is called.

        :param deliver: handles the decoded events, and might wait for consumers
        :param tasks: runs the writer task, if it is needed, and the timer
        :return: the error that broke the connection; ``None`` if the client closed it
        """
        try:
            if not self._ended:
                self._begin(tasks)
                # Inline, because each read would pass through another coroutine.
                try:
                    with self._transport.listening():
                        await self._read(deliver)
                finally:
                    self.timer.end()
        except Exception as exc:
            self._break(exc)
        finally:
            self._transition(ConnectionStep.END)
            self.writer.forbid_task()
            try:
                await self._end_writing(tasks)
            finally:
                if self._broken is None:
                    # If cancelled, there is no time to wait for the queue.
                    self.disconnect_nowait()
                try:
                    await self._transport.aclose()
                finally:
                    # Last, because the callers that it wakes must see a closed connection.
                    self.writer.stop()
        return self._broken

    def fail(self, exc: Exception) -> None:
        """End :meth:`run` with an error, because the connection is unusable."""
        self._break(exc)

    async def wait_for_packet_id(self, seconds: float | None) -> None:
        """
        Wait until a packet id is free or the connection has failed.

        If the broker acknowledges nothing, no packet id ever becomes free, so the connection fails.

        :param seconds: the time for an acknowledgement; ``None`` for no limit
        """
        freed = self.make_wakeup()
        self.session.call_when_free(freed.set)
        deadline = None
        if seconds is not None:
            deadline = ReplyDeadline(self._miss_packet_id, seconds, self.timer, self.writer)
        try:
            await freed.wait()
        finally:
            if deadline is not None:
                deadline.cancel()

    def _miss_packet_id(self) -> bool:
        """Fail, or extend the deadline if acknowledgements might wait behind messages."""
        if not self._reading_paused:
            self.fail(TimeoutError("no packet id is free: the broker acknowledges nothing"))
        return self._reading_paused

    async def abandon(self) -> None:
        """Close a connection on which :meth:`run` was never called."""
        await self._transport.aclose()

    async def disconnect(self, *, await_close: bool, discard: bool = True) -> None:
        """
        Send the queued packets and DISCONNECT.

        :param await_close: whether to wait until the broker has closed the connection, because it
            might not have read everything. If the client closed first, a message sent to it by the
            broker would cause a TCP reset, which discards what the broker has not read
        :param discard: whether to discard what arrives until then
        """
        self.send(Disconnect())
        await self.writer.wait_sent()
        await self._transport.send_eof()
        if await_close:
            if discard:
                self._transition(ConnectionStep.DISCARD)
                if self._waiting is not None:
                    self._waiting.cancel()
            await self.writer.wait_stopped()

    def disconnect_nowait(self) -> bool:
        """Send the queue and DISCONNECT without waiting, and return whether all was sent."""
        self.send(Disconnect())
        self.writer.send_nowait()
        return not self.writer.size

    def close(self) -> None:
        """End :meth:`run`, which closes the connection."""
        self._transition(ConnectionStep.END)
        self._transport.interrupt()
        if self._waiting is not None:
            self._waiting.cancel()

    async def pause_reading(self, wait: Callable[[], Awaitable[None]]) -> bool:
        """
        Wait for a consumer; called by the reader.

        :return: whether to deliver the received messages
        :raises ClosedResourceError: if the connection has ended
        """
        if self._delivers:
            self._reading_paused = True
            with anyio.CancelScope() as self._waiting:
                await wait()
        self.check()
        return not self._discards

    def check(self) -> None:
        """
        Check that the connection has not ended.

        :raises ClosedResourceError: if it has ended, or is about to
        """
        # In a task group that was never left, Trio's scopes catch the reader's cancellation.
        if self._ended or is_cancelled():
            self._transition(ConnectionStep.END)
            raise anyio.ClosedResourceError

    @property
    def _ended(self) -> bool:
        return self.state is _ENDED

    @property
    def _discards(self) -> bool:
        return self.state is _DISCARDING

    @property
    def _delivers(self) -> bool:
        return self.state not in (_DISCARDING, _ENDED)

    def _transition(self, step: ConnectionStep) -> None:
        self.state = CONNECTION_TRANSITIONS.get((self.state, step), self.state)

    def _begin(self, tasks: Tasks) -> None:
        self._transition(ConnectionStep.RUN)
        self.writer.begin(partial(tasks.start_soon, self._write, tasks.abandoned))
        Keepalive(
            *(self.timer, self.writer, self.session, self._last_heard),
            reading_paused=lambda: self._reading_paused,
            seconds=self._options.keepalive,
        )
        tasks.start(self.timer.run, self._break, self._reads_so_far, name="emitter_anyio timer")

    def _reads_so_far(self) -> int | None:
        """Return the number of reads, or ``None`` while received bytes are being handled."""
        return self._reads if self._awaits_bytes or self._reading_paused else None

    async def _write(self, abandoned: Callable[[], bool]) -> None:
        if self._ended:
            return
        with anyio.CancelScope() as scope:
            ended = anyio.Event()
            self._writing = scope, ended
            try:
                await self.writer.run(abandoned)
            except Exception as exc:
                self._break(exc)
            finally:
                ended.set()

    async def _end_writing(self, tasks: Tasks) -> None:
        # While the writer task sends, nothing else may send or close the transport.
        if self._writing is not None:
            scope, ended = self._writing
            scope.cancel()
            if not (self.writer.idle or tasks.abandoned()):
                with anyio.CancelScope(shield=True):
                    await ended.wait()

    def _break(self, exc: Exception) -> None:
        if self._ended:
            # The first reason counts. Closing causes further errors.
            return
        # Any end is orderly after DISCONNECT was sent. The broker might close the connection while
        # the send is still in progress, so after an EOF, bytes in that send count as sent.
        left = self.writer.unoffered_bytes if isinstance(exc, EOFError) else self.writer.size
        if left or not self.leaving:
            self._broken = exc
        else:
            self.read_by_broker = isinstance(exc, EOFError)
        self.close()

    async def _read(self, deliver: Deliver) -> None:
        await self._deliver(deliver, self._first)
        receive, codec, size = self._transport.receive, self._codec, READ_CHUNK_BYTES
        # Compare the state directly, because a property would slow down each read.
        while self.state is not _ENDED:
            if codec.turn_over and self.state is not _DISCARDING:
                # Packets wait to be decoded, so missing bytes do not mean that the peer is silent.
                await self._pause()
                self.check()
                data: bytes | memoryview = b""
                self._last_heard.note()
            else:
                self._awaits_bytes = True
                into = codec.unfilled
                if into is not None and len(into) < size:
                    # The next packets are read as well.
                    into = None
                data = await receive(size, into)
                self._awaits_bytes = False
                self._reads += 1
                if not data:
                    raise EOFError("the broker closed the connection")
                # Under load, larger reads wake each consumer once for several messages.
                if len(data) < size or into is not None:
                    size = READ_CHUNK_BYTES
                elif size < _MAX_READ_BYTES:
                    size *= 2
            if self._delivers:
                await self._deliver(deliver, codec.decode(data))

    async def _deliver(self, deliver: Deliver, events: Sequence[Event]) -> None:
        # Several acknowledgements wake several callers, whose next publishes are sent together.
        several = len(events) > 1 or (bool(events) and type(events[0]) is MessageBatch)
        self.writer.begin_turn(several=several)
        # PUBACKs may not follow DISCONNECT.
        if (written := self._codec.take_written()) and not self.leaving:
            self._acknowledge(written)
        await deliver(events)
        if self._reading_paused:
            self._reading_paused = False
            self._last_heard.note()

    def _acknowledge(self, pubacks: bytes) -> None:
        # Do not wait for queue space: the peer might not read before the client reads.
        self.writer.write(pubacks)
        unsent = self._unsent_pubacks
        unsent.extend([self.writer.queued] * (len(pubacks) // _PUBACK_BYTES))
        while unsent and unsent[0] <= self.writer.sent:
            unsent.popleft()
        if len(unsent) > _MAX_PACKET_IDS:
            raise RemoteProtocolError(
                f"the broker sent more than {_MAX_PACKET_IDS} QoS 1 messages without reading "
                "their acknowledgements"
            )
