"""One link's life: opening, reader, writer and keepalive, and a bounded goodbye."""

from __future__ import annotations

import math
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Final, TypeAlias

import anyio
from anyio.lowlevel import checkpoint

from ._backend import Wakeup, wakeup_maker
from ._batches import Messages
from ._channels import format_topic
from ._errors import ConnectError, ConnectRefusedError, RemoteProtocolError
from ._limits import Limits
from ._messages import encode_payload
from ._options import Options, Server
from ._packets import ConnAck, Connect, Disconnect, Event, Packet, Publish
from ._protocol._codec import Codec
from ._protocol._fast_path import is_qos_0_publish
from ._reading import CHUNK
from ._session import Session
from ._tasks import Tasks
from ._timer import Deadline, Due, open_timer
from ._transport import BROKEN, Transport, open_transport
from ._wants import Wants
from ._writer import Writer

Deliver: TypeAlias = Callable[[Sequence[Event]], Awaitable[None]]

FAST_PATH = True
"""Whether connections use the codec's fast path. The test session plain-engine turns it off."""

_LARGEST_CHUNK: Final = 262144
"""So much is read at a time of a link that brings more than was asked for."""

_LATE: Final = 0.05
"""More than this many seconds after its time a timeout shows that the process stood still."""

_LARGEST_READ: Final = 1048576
"""So many bytes are read at a time of a packet that is as large as that."""

_PUBACK_BYTES: Final = 4
_PACKET_IDS: Final = 65535
"""So many messages of QoS 1 may be unacknowledged: each has a packet id of its own."""

_REFUSALS: Final = {
    1: "it does not speak MQTT 3.1.1",
    2: "it does not take the client_id",
    3: "the server is unavailable",
    4: "bad user name or password",
    5: "not authorized",
}
_UNAVAILABLE: Final = 3
"""The only refusal that passes by itself."""

_CLIENT_CERTIFICATE: Final = (
    "; it might require a client certificate, which ssl_context.load_cert_chain() loads"
)
"""TLS 1.3 ends the client's handshake before the server looks for the client's certificate."""


class Connection:
    """
    A link that the broker has acknowledged.

    :param server: where it goes
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
        self.timer = open_timer()
        self.writer = Writer(transport, self.timer.clock)
        self.session = Session(wants, self.send, self.writer.write, codec.encode_publish)
        self.held_up = False
        """Whether the reader waits for a consumer, so that the peer's silence says nothing."""
        self.seen_off = False
        """Whether the broker has closed the link behind our DISCONNECT: it has read all of it."""
        self._transport = transport
        self._codec = codec
        self.last_heard = transport.last_heard
        """When bytes last arrived, or the reader last waited for a consumer."""
        self._first = first
        self._unsent_pubacks: deque[int] = deque()
        """For each PUBACK that has not left, how many bytes have to leave until it has."""
        self._reads = 0
        self._awaits_bytes = False
        self._options = options
        self._over = False
        """Whether it is to end, or has."""
        self._waits: anyio.CancelScope | None = None
        """In which the reader waits for a consumer."""
        self._writing: tuple[anyio.CancelScope, anyio.Event] | None = None
        """What the writer task runs in, and whether it has ended; where there is one."""
        self._discards = False
        """Whether what comes is of no interest any more."""
        self._broken: Exception | None = None

    @cached_property
    def make_wakeup(self) -> Callable[[], Wakeup]:
        """Makes what one waits for an answer by; many links never do."""
        return wakeup_maker()

    @cached_property
    def limits(self) -> Limits | None:
        """How long one waits here for an answer, unless it is said."""
        seconds = self._options.request_timeout
        return None if seconds is None else Limits(seconds, self.timer, self.writer)

    @property
    def leaving(self) -> bool:
        """Whether DISCONNECT has been queued, behind which nothing goes."""
        return self.writer.ended

    @property
    def broken(self) -> bool:
        """Whether it has ended, or will, and not because we closed it."""
        return self._broken is not None

    def send(self, packet: Packet) -> None:
        """Encode a packet and queue it; nothing goes behind DISCONNECT."""
        writer = self.writer
        if not writer.ended:
            write = writer.write_last if type(packet) is Disconnect else writer.write
            write(self._codec.encode(packet))

    @property
    def unsent(self) -> list[bytes]:
        """The publishes of QoS 0 of which no byte has been handed over."""
        return [bytes(one) for one in self.writer.untouched if is_qos_0_publish(one)]

    async def run(self, deliver: Deliver, tasks: Tasks) -> Exception | None:
        """
        Keep the link going until it breaks or :meth:`close` ends it.

        :param deliver: takes the events in, and may wait
        :param tasks: where the writer task goes, once there is something for it to do
        :return: why the link broke; ``None`` if we closed it
        """
        try:
            if not self._over:
                self._begin(tasks)
                # Not in a function: each time that something comes would go through it.
                try:
                    with self._transport.listening():
                        await self._read(deliver)
                finally:
                    self.timer.end()
        except Exception as exc:
            self._break(exc)
        finally:
            self._over = True
            self.writer.rest()
            try:
                await self._end_writing()
            finally:
                if self._broken is None:
                    # When cancelled, this is all there is time for.
                    self.blurt_goodbye()
                try:
                    await self._transport.aclose()
                finally:
                    # At the very end: those who are let go must find that there is no link.
                    self.writer.stop()
        return self._broken

    def fail(self, exc: Exception) -> None:
        """End :meth:`run` as though the link had broken, since it is of no use."""
        self._break(exc)

    async def abandon(self) -> None:
        """Close a link that was never run."""
        await self._transport.aclose()

    async def say_goodbye(self, *, unsettled: bool) -> None:
        """
        Send what is queued, and DISCONNECT behind it.

        :param unsettled: whether the broker may not have read all that matters. If we closed first,
            a message on its way to us would meet a closed socket, and the reset that answers it
            would take along what the broker has not read yet: wait until it has closed the link
        """
        self.send(Disconnect())
        await self.writer.left(self.writer.queued)
        await self._transport.send_eof()
        if unsettled:
            self._discards = True
            if self._waits is not None:
                self._waits.cancel()
            await self.writer.stopped()

    async def hold_up(self, wait: Callable[[], Awaitable[None]]) -> bool:
        """
        Have the reader, which calls it, wait for a consumer.

        :return: whether what has come is still of interest
        :raises ClosedResourceError: if the link has ended meanwhile
        """
        if not (self._discards or self._over):
            self.held_up = True
            with anyio.CancelScope() as self._waits:
                await wait()
        self.check()
        return not self._discards

    def check(self) -> None:
        """
        See to it that the reader takes in no more of what is at hand once the link is to end.

        :raises ClosedResourceError: if it is
        """
        if self._over:
            raise anyio.ClosedResourceError

    def close(self) -> None:
        """End :meth:`run`, which closes the link."""
        self._over = True
        self._transport.interrupt()
        if self._waits is not None:
            self._waits.cancel()

    def blurt_goodbye(self) -> bool:
        """Send what the link takes at once, and DISCONNECT; tells whether that is all."""
        self.send(Disconnect())
        self.writer.hurry()
        return not self.writer.size

    def _begin(self, tasks: Tasks) -> None:
        self.writer.begin(partial(tasks.start_soon, self._write))
        _Keepalive(self, self._options.keepalive)
        self.timer.begin(self._break, self._reads_so_far, tasks.start)

    def _reads_so_far(self) -> int | None:
        """Return how many reads there have been, or ``None`` while one is being handled."""
        return self._reads if self._awaits_bytes or self.held_up else None

    async def _write(self) -> None:
        if self._over:
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
        # While the task has something in hand, nobody else may send, nor close what it sends by.
        if self._writing is not None:
            scope, ended = self._writing
            scope.cancel()
            if not self.writer.idle:
                with anyio.CancelScope(shield=True):
                    await ended.wait()

    def _break(self, exc: Exception) -> None:
        if self._over:
            # What meets a link that is to end tells nothing about why.
            return
        # How the link ends is of no interest once DISCONNECT has left; the peer may close the link
        # while our stream has yet to say that it has. Silence tells that it has not.
        left = self.writer.kept if isinstance(exc, EOFError) else self.writer.size
        if left or not self.leaving:
            self._broken = exc
        else:
            self.seen_off = isinstance(exc, EOFError)
        self.close()

    async def _read(self, deliver: Deliver) -> None:
        await self._take_in(deliver, self._first)
        receive, codec, size = self._transport.receive, self._codec, CHUNK
        while not self._over:
            if codec.turn_over and not self._discards:
                # While there is more to take in, the peer's silence says nothing.
                await checkpoint()
                data = b""
                self.last_heard.time = self.timer.clock()
            else:
                self._awaits_bytes = True
                missing = codec.missing
                data = await receive(size if missing <= size else min(missing, _LARGEST_READ))
                self._awaits_bytes = False
                self._reads += 1
                if not data:
                    raise EOFError("the broker closed the link")
                # In a flood each consumer then wakes for several messages, and not for each.
                if len(data) < size:
                    size = CHUNK
                elif size < _LARGEST_CHUNK:
                    size *= 2
            if not (self._discards or self._over):
                await self._take_in(deliver, codec.decode(data))

    async def _take_in(self, deliver: Deliver, events: Sequence[Event]) -> None:
        # Several acknowledgements let several go on: what they publish leaves together.
        self.writer.gathers = len(events) > 1 or (bool(events) and type(events[0]) is Messages)
        # Nothing goes after DISCONNECT.
        if (written := self._codec.take_written()) and not self.leaving:
            self._acknowledge(written)
        await deliver(events)
        if self.held_up:
            self.held_up = False
            self.last_heard.time = self.timer.clock()

    def _acknowledge(self, pubacks: bytes) -> None:
        # Not by waiting for room: a peer may read only when we have read.
        self.writer.write(pubacks)
        unsent = self._unsent_pubacks
        unsent.extend([self.writer.queued] * (len(pubacks) // _PUBACK_BYTES))
        while unsent and unsent[0] <= self.writer.sent:
            unsent.popleft()
        if len(unsent) > _PACKET_IDS:
            raise RemoteProtocolError(
                f"the broker sent more than {_PACKET_IDS} messages of QoS 1 and read no "
                "acknowledgement of them"
            )


class _Keepalive(Due):
    """Sends a PINGREQ after ``keepalive`` seconds without a byte in one of the two directions."""

    def __init__(self, link: Connection, seconds: float) -> None:
        self.link = link
        self.seconds = seconds
        self.excused = -math.inf
        """When bytes had last arrived as a timeout of a PINGREQ last fell due late."""
        self.fall_due(-math.inf)

    @property
    def done(self) -> bool:
        return False

    def fall_due(self, now: float) -> None:
        link = self.link
        when = min(link.last_heard.time, link.writer.last_sent) + self.seconds
        # The last PINGREQ left a little after it was due.
        if when <= now + _LATE:
            timeout = _PingTimeout(self, now)
            link.timer.add(now + self.seconds * 0.5, timeout)
            link.session.ping(awaited=False).call_when_done(link.timer.put_off)
            link.writer.call_when_left(timeout.begin)
            when = now + self.seconds
        link.timer.add(when, self)


class _PingTimeout(Deadline):
    """
    Ends a connection on which nothing is received after a PINGREQ.

    It falls due half a ``keepalive`` period after the PINGREQ has left, or one and a half periods
    after bytes last arrived, whichever is later. A PINGREQ that cannot leave has one and a half
    periods from when it was queued. If the timeout falls due late, because the process stood still,
    it is up to the next PINGREQ: the network might have stood still as well.
    """

    def __init__(self, keepalive: _Keepalive, now: float) -> None:
        self._keepalive = keepalive
        self._last_heard = keepalive.link.last_heard.time
        self._has_left = False
        self._when = now + keepalive.seconds * 1.5

    def begin(self) -> None:
        """Begin, since the PINGREQ has left."""
        sent, seconds = self._keepalive.link.writer.last_sent, self._keepalive.seconds
        self._has_left = True
        self._when = max(sent, self._last_heard + seconds) + seconds * 0.5

    @property
    def done(self) -> bool:
        return self._keepalive.link.last_heard.time > self._last_heard

    def fall_due(self, now: float) -> None:
        keepalive = self._keepalive
        if now < self._when:
            keepalive.link.timer.add(self._when, self)
        else:
            keepalive.link.timer.judge(self, now)

    def judge(self, now: float) -> None:
        keepalive = self._keepalive
        if now > self._when + _LATE and keepalive.excused < self._last_heard:
            keepalive.excused = self._last_heard
        elif not keepalive.link.held_up:
            raise TimeoutError(
                f"the broker was silent for {round(now - self._last_heard, 2):g} s and did not "
                f"{'answer' if self._has_left else 'take'} a PINGREQ"
            )


async def open_connection(
    options: Options, wants: Wants, *, will_key: str | None = None, after: Server | None = None
) -> Connection:
    """
    Try each server once, in turn, each under ``connect_timeout``.

    Cancelling it at any point leaves nothing behind.

    :param wants: what the client wants from every connection
    :param will_key: the key of the will, if there is one
    :param after: begin behind this server, which has just failed
    :raises ConnectError: if none can be reached, with every cause
    """
    connect = _make_connect(options, will_key)
    causes: dict[str, Exception] = {}
    begin = 0 if after is None else options.servers.index(after) + 1
    for server in (*options.servers[begin:], *options.servers[:begin]):
        try:
            with anyio.move_on_after(options.connect_timeout):
                return await _open(server, options, wants, connect)
            causes[str(server)] = TimeoutError()
        except (*BROKEN, EOFError, RemoteProtocolError, ConnectError) as exc:
            causes[str(server)] = exc
    raise _connect_error(causes, options, after)


async def _open(server: Server, options: Options, wants: Wants, connect: Connect) -> Connection:
    transport = await open_transport(server, options)
    try:
        codec = Codec(connect, options.max_message_size, fast_path=FAST_PATH)
        data = codec.connect()
        while data:
            data = data[await transport.send(data) :]
        events: list[Event] = []
        while not events:
            if not (data := await transport.receive()):
                raise EOFError(
                    "the peer closed the connection instead of answering CONNECT"
                    + _CLIENT_CERTIFICATE * server.secure
                )
            events = codec.decode(data)
        match events.pop(0):
            case ConnAck(0):
                return Connection(server, transport, codec, events, options, wants)
            case ConnAck(code):
                raise ConnectRefusedError(
                    f"{server} refused: {_REFUSALS.get(code, f'code {code}')}", code=code
                )
            case RemoteProtocolError() as exc:
                raise exc
        raise AssertionError("the codec begins with CONNACK")  # pragma: no cover - its promise
    except BaseException:
        await transport.aclose()
        raise


def is_permanent(cause: Exception) -> bool:
    """Tell whether a server that could not be reached will fail in the same way again."""
    if isinstance(cause, ConnectRefusedError):
        return cause.code != _UNAVAILABLE
    return isinstance(cause, ssl.SSLError)


def _make_connect(options: Options, will_key: str | None) -> Connect:
    will = None
    if options.will is not None and will_key is not None:
        given = options.will
        topic = format_topic(will_key, given.channel)
        will = Publish(topic.encode(), encode_payload(given.message), None, given.retain)
    # MQTT counts in whole seconds; Emitter passes over what it is told here.
    return Connect(
        options.client_id,
        options.username,
        options.password,
        max(1, round(options.keepalive)),
        will,
    )


def _connect_error(
    causes: dict[str, Exception], options: Options, worked: Server | None
) -> ConnectError:
    words = []
    for server, cause in causes.items():
        if isinstance(cause, ConnectRefusedError):
            words.append(str(cause))
        elif isinstance(cause, TimeoutError) and not str(cause):
            words.append(f"{server}: no answer within {options.connect_timeout:g} s")
        else:
            words.append(f"{server}: {str(cause) or type(cause).__name__}")
    text = "could not connect to " + "; ".join(words)
    if options.servers[0].scheme != "unix" and any(
        isinstance(cause, ConnectionRefusedError) and server != str(worked)
        for server, cause in causes.items()
    ):
        text += (
            " (Emitter listens on 8080, and on 443 with TLS, unless it is told otherwise, not on "
            "MQTT's 1883 and 8883)"
        )
    last = list(causes.values())[-1]
    if isinstance(last, ConnectRefusedError):
        error: ConnectError = ConnectRefusedError(text, causes, code=last.code)
    else:
        error = ConnectError(text, causes)
    error.__cause__ = last
    return error
