"""One connection: its reader, its writer and its keepalive, and an orderly close."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from typing import Final, TypeAlias

import anyio
from anyio.lowlevel import checkpoint

from emitter_anyio._backend import READ_CHUNK_BYTES, current_backend
from emitter_anyio._backend.tasks import Tasks
from emitter_anyio._protocol.codec import Codec
from emitter_anyio._protocol.fast_path import is_qos_0_publish
from emitter_anyio._protocol.packets import Disconnect, Event, Packet
from emitter_anyio._protocol.session import Session
from emitter_anyio._protocol.wants import Wants
from emitter_anyio._values.batches import MessageBatch
from emitter_anyio._values.errors import RemoteProtocolError

from .keepalive import Keepalive
from .options import Options, Server
from .timer import Timer
from .transport import Transport
from .writer import Writer

Deliver: TypeAlias = Callable[[Sequence[Event]], Awaitable[None]]

_MAX_READ_BYTES: Final = 262144
"""The most bytes that are read together while reads are full."""

_MAX_PACKET_READ_BYTES: Final = 1048576
"""The most bytes that are read together if a packet of that size has begun."""

_PUBACK_BYTES: Final = 4
_MAX_PACKET_IDS: Final = 65535
"""The most QoS 1 messages that can be unacknowledged, because each has its own packet id."""


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
    """What changes the state of a connection."""

    RUN = "its tasks run"
    DISCONNECT = "DISCONNECT is queued, after which nothing is sent"
    DISCARD = "what arrives is no longer delivered"
    END = "it ends, or is about to"


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
    :param first: what was decoded together with the CONNACK
    :param options: the client's options
    :param wants: what the client wants from every connection
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
        self.timer = Timer(backend.clock)
        self.writer = Writer(transport, self.timer.clock)
        self.session = Session(wants, self.send, self.writer.write, codec.encode_publish)
        self.state = ConnectionState.OPENING
        self.read_by_broker = False
        """Whether the broker has closed the connection after DISCONNECT: it has read everything."""
        self._transport = transport
        self._codec = codec
        self._last_heard = transport.last_heard
        """When bytes last arrived, or the reader last waited for a consumer."""
        self._reading_paused = False
        """Whether the reader waits for a consumer, so that the broker's silence means nothing."""
        self._first = first
        self._unsent_pubacks: deque[int] = deque()
        """For each PUBACK that is not sent, the number of bytes to send until it is."""
        self._reads = 0
        self._awaits_bytes = False
        self._options = options
        self._waiting: anyio.CancelScope | None = None
        """The scope in which the reader waits for a consumer."""
        self._writing: tuple[anyio.CancelScope, anyio.Event] | None = None
        """The scope of the writer task, and the event that it has ended, if there is one."""
        self._broken: Exception | None = None

    @property
    def leaving(self) -> bool:
        """Whether DISCONNECT is queued, after which nothing is sent."""
        return self.writer.ended

    @property
    def broken(self) -> bool:
        """Whether the connection has ended, or is about to, and the client has not closed it."""
        return self._broken is not None

    @property
    def unsent(self) -> list[bytes]:
        """The QoS 0 publishes of which no byte was sent."""
        return [bytes(one) for one in self.writer.unsent_packets if is_qos_0_publish(one)]

    def send(self, packet: Packet) -> None:
        """Queue a packet, unless DISCONNECT is queued."""
        if self.writer.ended:
            return
        data = self._codec.encode(packet)
        if type(packet) is Disconnect:
            self.writer.write_last(data)
            self._take(ConnectionStep.DISCONNECT)
        else:
            self.writer.write(data)

    async def run(self, deliver: Deliver, tasks: Tasks) -> Exception | None:
        """
        Run the connection until it breaks or :meth:`close` ends it.

        :param deliver: gets the decoded packets, and may wait
        :param tasks: runs the writer task, if there is something for it to do
        :return: why the connection broke; ``None`` if the client has closed it
        """
        try:
            if not self._ended:
                self._begin(tasks)
                # Not in a function, through which each read would go.
                try:
                    with self._transport.listening():
                        await self._read(deliver)
                finally:
                    self.timer.end()
        except Exception as exc:
            self._break(exc)
        finally:
            self._take(ConnectionStep.END)
            self.writer.forbid_task()
            try:
                await self._end_writing()
            finally:
                if self._broken is None:
                    # When cancelled, this is all there is time for.
                    self.disconnect_nowait()
                try:
                    await self._transport.aclose()
                finally:
                    # At the very end, because the callers that it wakes must find no connection.
                    self.writer.stop()
        return self._broken

    def fail(self, exc: Exception) -> None:
        """End :meth:`run` as if the connection had broken, because it is of no use."""
        self._break(exc)

    async def abandon(self) -> None:
        """Close a connection that was never run."""
        await self._transport.aclose()

    async def disconnect(self, *, await_close: bool) -> None:
        """
        Send what is queued, and DISCONNECT.

        :param await_close: whether the broker might not have read everything that matters. If the
            client closed first, a message on its way to it would meet a closed socket, and the
            reset that answers it would discard what the broker has not read yet. So wait until the
            broker has closed the connection
        """
        self.send(Disconnect())
        await self.writer.wait_sent()
        await self._transport.send_eof()
        if await_close:
            self._take(ConnectionStep.DISCARD)
            if self._waiting is not None:
                self._waiting.cancel()
            await self.writer.wait_stopped()

    def disconnect_nowait(self) -> bool:
        """Send what is queued, and DISCONNECT, without waiting; return whether all was sent."""
        self.send(Disconnect())
        self.writer.send_nowait()
        return not self.writer.size

    def close(self) -> None:
        """End :meth:`run`, which closes the connection."""
        self._take(ConnectionStep.END)
        self._transport.interrupt()
        if self._waiting is not None:
            self._waiting.cancel()

    async def pause_reading(self, wait: Callable[[], Awaitable[None]]) -> bool:
        """
        Have the reader, which calls this, wait for a consumer.

        :return: whether what was received is still to be delivered
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
        Check that the reader is to deliver more.

        :raises ClosedResourceError: if the connection is about to end
        """
        if self._ended:
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

    def _take(self, step: ConnectionStep) -> None:
        self.state = CONNECTION_TRANSITIONS.get((self.state, step), self.state)

    def _begin(self, tasks: Tasks) -> None:
        self._take(ConnectionStep.RUN)
        self.writer.begin(partial(tasks.start_soon, self._write))
        Keepalive(
            *(self.timer, self.writer, self.session, self._last_heard),
            reading_paused=lambda: self._reading_paused,
            seconds=self._options.keepalive,
        )
        tasks.start(self.timer.run, self._break, self._reads_so_far, name="emitter_anyio timer")

    def _reads_so_far(self) -> int | None:
        """Return the number of reads, or ``None`` while one is being delivered."""
        return self._reads if self._awaits_bytes or self._reading_paused else None

    async def _write(self) -> None:
        if self._ended:
            return
        with anyio.CancelScope() as scope:
            ended = anyio.Event()
            self._writing = scope, ended
            try:
                await self.writer.run()
            except Exception as exc:
                self._break(exc)
            finally:
                ended.set()

    async def _end_writing(self) -> None:
        # While the writer task sends, nothing else may send, nor close what it sends by.
        if self._writing is not None:
            scope, ended = self._writing
            scope.cancel()
            if not self.writer.idle:
                with anyio.CancelScope(shield=True):
                    await ended.wait()

    def _break(self, exc: Exception) -> None:
        if self._ended:
            # An error of a connection that is about to end does not explain why.
            return
        # After DISCONNECT was sent, it does not matter how the connection ends. The broker may
        # close it before the transport reports that DISCONNECT was sent. If the broker is silent,
        # it was not.
        left = self.writer.unoffered_bytes if isinstance(exc, EOFError) else self.writer.size
        if left or not self.leaving:
            self._broken = exc
        else:
            self.read_by_broker = isinstance(exc, EOFError)
        self.close()

    async def _read(self, deliver: Deliver) -> None:
        await self._take_in(deliver, self._first)
        receive, codec, size = self._transport.receive, self._codec, READ_CHUNK_BYTES
        # The state is compared in place: each read would pay for a property.
        while self.state is not _ENDED:
            if codec.turn_over and self.state is not _DISCARDING:
                # While decoded packets wait, the broker's silence means nothing.
                await checkpoint()
                data = b""
                self._last_heard.note()
            else:
                self._awaits_bytes = True
                missing = codec.missing
                data = await receive(
                    size if missing <= size else min(missing, _MAX_PACKET_READ_BYTES)
                )
                self._awaits_bytes = False
                self._reads += 1
                if not data:
                    raise EOFError("the broker closed the link")
                # In a flood, each consumer then wakes for several messages instead of for each.
                if len(data) < size:
                    size = READ_CHUNK_BYTES
                elif size < _MAX_READ_BYTES:
                    size *= 2
            if self._delivers:
                await self._take_in(deliver, codec.decode(data))

    async def _take_in(self, deliver: Deliver, events: Sequence[Event]) -> None:
        # Several acknowledgements wake several callers: what they publish is sent together.
        several = len(events) > 1 or (bool(events) and type(events[0]) is MessageBatch)
        self.writer.begin_turn(several=several)
        # Nothing is sent after DISCONNECT.
        if (written := self._codec.take_written()) and not self.leaving:
            self._acknowledge(written)
        await deliver(events)
        if self._reading_paused:
            self._reading_paused = False
            self._last_heard.note()

    def _acknowledge(self, pubacks: bytes) -> None:
        # Without waiting for space: a peer might read only after the client has read.
        self.writer.write(pubacks)
        unsent = self._unsent_pubacks
        unsent.extend([self.writer.queued] * (len(pubacks) // _PUBACK_BYTES))
        while unsent and unsent[0] <= self.writer.sent:
            unsent.popleft()
        if len(unsent) > _MAX_PACKET_IDS:
            raise RemoteProtocolError(
                f"the broker sent more than {_MAX_PACKET_IDS} messages of QoS 1 and read no "
                "acknowledgement of them"
            )
