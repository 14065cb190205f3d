"""A session that uses every method of the client, over a connection that fails at a chosen byte."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from functools import partial
from typing import Any, TypeVar

import anyio
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from emitter_anyio import (
    Backoff,
    ConnectError,
    ConnectionLostError,
    Emitter,
    EmitterMessage,
    EventStream,
    Gap,
    PresenceEvent,
    RequestTimeoutError,
    connect,
)
from emitter_anyio.testing import Broker
from emitter_anyio.testing._packets import PacketReader, Publish
from emitter_anyio.testing._peer import Kind, Peer
from tests.support.tables import tables

from .memory import Direction, Fault, MemoryConnectable, MemoryStream

T = TypeVar("T")

CALL_TIMEOUT = 600.0
"""The longest time in seconds that a call may take: it might wait until a ping times out."""

_STORAGE_TTL = 86400
"""Seconds; longer than any session, because the storage uses the real clock."""

_EARLIER = b"before the subscription"

_HISTORY_SECONDS = 13
"""
The period before a session that the session reads as well. To find messages older than a page, the
client goes back 1, 2, 4, 8, … seconds, so a second more or less does not change the requests.
"""

_KEY_BROKER = Broker()
LICENSE, SECRET = _KEY_BROKER.license, _KEY_BROKER.secret_key
KEY = _KEY_BROKER.keygen("a/#/", "rwslp")
GROUP_KEY = _KEY_BROKER.keygen("$share/q/a/g/", "r")
OTHER_KEY = _KEY_BROKER.keygen("b/", "r")


class RecordingSubscriber(Peer):
    """A subscriber inside the broker, which no fault affects."""

    def __init__(self) -> None:
        super().__init__(self._record)
        self.received: list[tuple[str, bytes]] = []

    def _record(self, kind: Kind, data: bytes) -> None:
        reader = PacketReader()
        reader.feed(data)
        packet = reader.next_packet()
        assert isinstance(packet, Publish)
        self.received.append((packet.topic, packet.payload))


class Session:
    """
    A session, and the checks of what it must fulfil.

    :param broker: the broker
    :param args: for :func:`emitter_anyio.connect`
    :param lost: called when a connection is lost
    :param options: for :func:`emitter_anyio.connect`
    """

    def __init__(
        self, broker: Broker, *args: str, lost: Callable[[], None] = lambda: None, **options: Any
    ) -> None:
        self.broker = broker
        self.fault_occurred = False
        """Whether the fault has occurred."""
        self.emitter: Emitter = connect(*args, reconnect=Backoff(maximum=1), **options)
        self._lost = lost
        self.errors: list[str] = []
        """The calls that ended with a documented error."""
        self._recorder = RecordingSubscriber()
        broker._exchange.add_subscription(self._recorder, broker._topic("a/"))
        self._handled: list[bytes] = []
        self._generated_key = ""
        self._started = 0.0
        self._number = 0
        self._marker_numbers = itertools.count()
        self._marker = b""
        self._delivery_check = anyio.CancelScope()
        self._queued: set[int] = set()
        self._acknowledged: set[int] = set()

    def on_fault(self) -> None:
        """Publish at the broker and ban a key, while the client is disconnected."""
        self.fault_occurred = True
        self._publish_at_broker("a/r/", b"during the fault")
        if self._generated_key:
            self.broker._exchange.ban(self._generated_key)

    async def run(self) -> None:
        """Run the session and check the client's promises."""
        self.emitter.on("disconnect", self._connection_lost)
        self.emitter.on("message", lambda message: self._handled.append(message.binary))
        # A resumption reads from this message on; without it, it would search all years.
        self._publish_at_broker("a/r/", _EARLIER)
        self._started = time.time()
        while True:
            try:
                async with self.emitter:
                    await self._use_client()
            except ConnectError:
                assert not self._number, "ConnectError after the client was entered"
                self.errors.append("enter")
                self._connection_lost()
            else:
                break
        with anyio.fail_after(CALL_TIMEOUT):
            for client in list(self.broker._clients):
                await client.wait_closed()
        await checkpoint()
        self._check_accounts()
        self._check_tables()

    async def _use_client(self) -> None:
        emitter = self.emitter
        async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
            enter = partial(self._enter, stack)
            message = await enter(lambda: emitter.stream("message"))
            changes = await enter(lambda: emitter.stream("presence", channel="a/c/"))
            entered = await enter(lambda: emitter.subscribe(KEY, "a/e/"))
            await self._retry(lambda: emitter.subscribe(KEY, "a/w/", 0))
            group = await enter(lambda: emitter.subscribe(GROUP_KEY, "a/g/", group="q"))
            resumed = await enter(
                lambda: emitter.subscribe(KEY, "a/r/", 0, resume=True, mark_gaps=True)
            )
            resumed_from, connections = (
                len(self._recorder.received),
                emitter.statistics().connections,
            )
            await self._publish(1, "a/r/", ttl=_STORAGE_TTL)
            by_function = await enter(lambda: emitter.subscribe(self._key, "a/f/", 0))
            feed = await enter(lambda: emitter.watch_presence(KEY, "a/p/"))
            await self._retry(lambda: emitter.presence(KEY, "a/c/", changes=True))
            await self._retry(lambda: emitter.link(KEY, "a/l/", "l1", subscribe=True))
            await self._retry(lambda: tasks.start(self._serve))
            await self._use_every_method()

            received = await self._check_deliveries(
                {
                    "a/e/": entered,
                    "a/w/": message,
                    "a/l/": message,
                    "a/g/": group,
                    "a/f/": by_function,
                    "a/r/": resumed,
                },
                {"a/p/": feed, "a/c/": changes},
            )
            resumed_items = received["a/r/"]
            stored = [
                text
                for channel, text in self._recorder.received[resumed_from:]
                if channel == "a/r/"
            ]
            # The session does not wait for messages after the marker.
            expected = set(stored[: stored.index(self._marker)])
            messages = [it for it in resumed_items if isinstance(it, EmitterMessage)]
            missing = expected - {it.binary for it in messages}
            assert not missing, f"resume=True lost {missing}"
            assert _EARLIER not in {it.binary for it in messages}
            for channel, items in received.items():
                live = [it for it in items if type(it) is EmitterMessage]
                numbers = list(_numbers(it.binary for it in live))
                assert numbers == sorted(set(numbers)), f"{channel} received {numbers}"
            gaps = [it for it in resumed_items if isinstance(it, Gap)]
            assert bool(gaps) == (emitter.statistics().connections > connections), gaps
            assert all(gap.complete for gap in gaps), gaps
            tasks.cancel_scope.cancel()
        await self._retry(lambda: emitter.unsubscribe(KEY, "a/w/"))
        await self._retry(lambda: emitter.unsubscribe(KEY, "a/l/"))
        await self._retry(lambda: emitter.presence(KEY, "a/c/", changes=False))
        await self._publish(0, "a/e/")
        await self._wait_for_single_connection()
        for client in self.broker.clients:
            assert [it for it in client.subscriptions if not it.startswith("a/s/")] == []
            assert not client.peer.watched
        await self._publish(0, "a/e/")
        # The sweep covers the first connection, so nothing else follows.
        async with AsyncExitStack() as stack:
            moved = await self._enter(stack, lambda: emitter.subscribe(KEY, "a/m/", 0))
            await self._call("reconnect", emitter.reconnect)
            await self._wait_for_single_connection()
            self._publish_at_broker("a/m/", b"after reconnect()")
            await _until(moved, partial(_is_message, "a/m/", b"after reconnect()"))

    async def _use_every_method(self) -> None:
        emitter = self.emitter
        await self._publish(0, "a/e/")
        await self._publish(1, "a/e/")
        await self._call("flush", emitter.flush)
        await self._publish(0, "a/w/")
        await self._publish(0, "a/r/", ttl=_STORAGE_TTL)
        await self._publish(0, None)
        await self._publish(1, None)
        key = await self._call("keygen", lambda: emitter.keygen(SECRET, "b/", "r"))
        assert key is None or key.channel == "b/"
        banned = await self._call("keyban", lambda: emitter.keyban(SECRET, OTHER_KEY))
        assert banned in (None, True)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._call, "me", emitter.me)
            tasks.start_soon(self._publish, 1, "a/f/")
            tasks.start_soon(self._call, "request", partial(self._check_reply, "now"))
            tasks.start_soon(self._call, "request_many", self._check_replies)
        await self._publish(1, "a/r/", ttl=_STORAGE_TTL)
        stored = await self._call("history", self._read_back)
        assert stored is None or self._acknowledged_on_r <= stored

    async def _serve(self, *, task_status: TaskStatus[None]) -> None:
        async def answer(message: EmitterMessage) -> bytes:
            return b"re: " + message.binary

        await self.emitter.serve(KEY, "a/s/", answer, task_status=task_status)

    async def _key(self) -> str:
        generated = await self.emitter.keygen(SECRET, "a/f/", "r")
        while generated.key in self.broker._exchange.banned:
            # The salt has only 32767 values, so keygen might return the banned key again.
            generated = await self.emitter.keygen(SECRET, "a/f/", "r")
        self._generated_key = generated.key
        return generated.key

    async def _read_back(self) -> set[int]:
        # Without since, half of all bytes would be requests for messages of earlier years.
        since = self._started - _HISTORY_SECONDS
        stored = self.emitter.history(KEY, "a/r/", since=since)
        return set(_numbers([message.binary async for message in stored]))

    async def _call(self, name: str, method: Callable[[], Awaitable[T]]) -> T | None:
        """Return the result of a call, or ``None`` after a documented error."""
        with anyio.fail_after(CALL_TIMEOUT):
            try:
                return await method()
            except (ConnectionLostError, RequestTimeoutError):
                self.errors.append(name)
                return None

    async def _retry(self, method: Callable[[], Awaitable[T]]) -> T:
        """Repeat a call until it succeeds."""
        while True:
            errors = len(self.errors)
            value = await self._call("again", method)
            if len(self.errors) == errors:
                return value  # type: ignore[return-value]  # the call succeeded
            assert errors < 20, "the call keeps failing"

    async def _enter(
        self, stack: AsyncExitStack, create: Callable[[], AbstractAsyncContextManager[T]]
    ) -> T:
        return await self._retry(lambda: stack.enter_async_context(create()))

    async def _publish(self, qos: int, channel: str | None, ttl: int | None = None) -> None:
        self._number += 1
        number, text = self._number, f"#{self._number}"

        async def publish() -> None:
            if channel is None:
                await self.emitter.publish_with_link("l1", text, qos=qos)  # type: ignore[arg-type]
            else:
                await self.emitter.publish(KEY, channel, text, ttl, qos=qos)  # type: ignore[arg-type]
            (self._acknowledged if qos else self._queued).add(number)

        await self._call("publish", publish)
        # Let the writer take this packet, so that later ones are queued after it if it stalls.
        await anyio.sleep(0.001)

    async def _wait_for_single_connection(self) -> None:
        """Wait until a connection works and the broker has closed all others."""
        await self._retry(self.emitter.flush)
        with anyio.fail_after(CALL_TIMEOUT):
            for client in self.broker.clients[:-1]:
                await client.wait_closed()

    async def _check_deliveries(
        self,
        subscribed: Mapping[str, EventStream[Any]],
        watched: Mapping[str, EventStream[PresenceEvent]],
    ) -> Mapping[str, list[object]]:
        """
        Check that every subscription and feed delivers; repeat if the connection is lost.

        :return: all that the subscriptions received
        """
        received: dict[str, list[object]] = {channel: [] for channel in subscribed}

        async def check() -> None:
            self._marker = marker = b"marker %d" % next(self._marker_numbers)
            guest = RecordingSubscriber()
            failed_before = bool(self.errors) or self.emitter.statistics().connections > 1
            for channel in subscribed:
                self._publish_at_broker(channel, marker)
            for channel in watched:
                self.broker._exchange.add_subscription(guest, self.broker._topic(f"{channel}x/"))
            if failed_before:
                # Otherwise these have already succeeded.
                await self.emitter.publish_with_link("l1", marker, qos=1)
                await self._check_reply("again")
            for channel, stream in subscribed.items():
                await _until(stream, partial(_is_message, channel, marker), received[channel])
            for stream in watched.values():
                await _until(stream, lambda event: event.who[0].id == guest.id)
            if failed_before:
                await _until(subscribed["a/l/"], partial(_is_message, "a/l/", marker))

        while True:
            await self._wait_for_single_connection()
            connections = self.emitter.statistics().connections
            with anyio.fail_after(CALL_TIMEOUT), anyio.CancelScope() as self._delivery_check:
                with suppress(ConnectionLostError, RequestTimeoutError):
                    await check()
                    return received
            await self._wait_for_single_connection()
            assert self.emitter.statistics().connections > connections, (
                "failed without a lost connection"
            )

    def _connection_lost(self) -> None:
        self._delivery_check.cancel()
        self._lost()

    async def _check_reply(self, text: str) -> None:
        reply = await self.emitter.request(KEY, "a/s/", text)
        assert reply.binary == b"re: " + text.encode()

    async def _check_replies(self) -> None:
        async with self.emitter.request_many(KEY, "a/s/", "all", count=1) as replies:
            async for reply in replies:
                assert reply.binary == b"re: all"

    def _publish_at_broker(self, channel: str, payload: bytes) -> None:
        # Broker.publish() would have to be awaited, and a fault calls this synchronously.
        self.broker._exchange.store_and_send(self.broker._topic(channel), payload, _STORAGE_TTL)

    @property
    def _acknowledged_on_r(self) -> set[int]:
        return self._acknowledged & set(
            _numbers(text for channel, text in self._recorder.received if channel == "a/r/")
        )

    def _check_accounts(self) -> None:
        delivered = _numbers(text for _, text in self._recorder.received)
        assert delivered == sorted(set(delivered)), f"out of order or duplicated: {delivered}"
        assert self._acknowledged <= set(delivered), "acknowledged but not delivered"
        lost = self._queued - set(delivered)
        figures = self.emitter.statistics()
        assert len(lost) <= figures.uncertain + figures.unsent, (
            f"lost without being counted: {lost}"
        )
        assert figures.pending == 0
        assert figures.queued_bytes == 0
        assert figures.nonsense == 0
        assert figures.dropped == 0
        assert self._marker in self._handled

    def _check_tables(self) -> None:
        """Check that the client and the broker hold no entries after the session."""
        assert self.emitter.state == "closed"
        entries = tables(self.emitter)
        entries.pop("Events._registrations", None)
        assert not entries, entries
        assert not self.broker._clients


async def _until(
    stream: EventStream[T], wanted: Callable[[T], bool], received: list[object] | None = None
) -> None:
    async for item in stream:
        if received is not None:
            received.append(item)
        if wanted(item):
            return
    raise AssertionError(f"{stream} ended")


def _is_message(channel: str, payload: bytes, item: object) -> bool:
    return isinstance(item, EmitterMessage) and (item.channel, item.binary) == (channel, payload)


def _numbers(texts: Iterable[bytes]) -> list[int]:
    return [int(text[1:]) for text in texts if text.startswith(b"#")]


@asynccontextmanager
async def broker_in_memory(connectable: MemoryConnectable) -> AsyncGenerator[Broker]:
    """Run a broker that accepts connections from a connectable."""
    broker = Broker(license=LICENSE)
    # Share the cache of deciphered keys: deciphering takes a tenth of a session's time.
    broker._exchange._find_key_cached = _KEY_BROKER._exchange._find_key_cached

    async def accept() -> None:
        while True:
            tasks.start_soon(broker._serve, await connectable.accept())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(accept)
        yield broker
        tasks.cancel_scope.cancel()
    connectable.close()


class _FaultyConnectable(MemoryConnectable):
    """A connectable whose first connection gets the fault and whose second attempt is refused."""

    def __init__(self, fault: Fault | None, then: Callable[[], None]) -> None:
        super().__init__(capacity=512, before=self._refuse)
        self._fault = fault
        self._then = then

    async def _refuse(self, attempt: int) -> None:
        if attempt == 2:
            raise ConnectionRefusedError("the broker has not restarted yet")

    async def connect(self) -> MemoryStream:
        stream = await super().connect()
        if self._fault is not None and self.attempts == 1:
            self._fault.inject(stream, self._then)
        return stream


async def run_session(fault: Fault | None = None) -> MemoryStream:
    """
    Run one session over in-memory connections.

    :return: the client's end of the first connection
    """
    connectable = _FaultyConnectable(fault, lambda: session.on_fault())  # noqa: PLW0108 - created below
    async with broker_in_memory(connectable) as broker:
        session = Session(broker, connectable=connectable)
        await session.run()
    assert all(stream.closed for stream in connectable.streams)
    assert session.fault_occurred is (fault is not None), "the fault did not occur"
    return connectable.streams[0]


async def measure() -> dict[Direction, int]:
    """Return the number of bytes of a session without a fault, by direction."""
    stream = await run_session()
    return {"to_broker": stream.outbound.delivered, "to_client": stream.inbound.delivered}


async def run_sessions(faults: Iterable[Fault]) -> None:
    """Run a session for each fault concurrently, and raise the first five failures as a group."""
    failures: list[Exception] = []

    async def run(fault: Fault) -> None:
        try:
            await run_session(fault)
        except Exception as exc:
            exc.add_note(f"with {fault}")
            failures.append(exc)

    async with anyio.create_task_group() as tasks:
        for fault in faults:
            tasks.start_soon(run, fault)
    if failures:
        raise ExceptionGroup(f"{len(failures)} sessions failed", failures[:5])
