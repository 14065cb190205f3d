"""A session that uses every verb, over a link that fails at a chosen byte."""

from __future__ import annotations

import itertools
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

PATIENCE = 600.0
"""No call may take so many seconds: the longest waits for a link that is found to be dead."""

_LONG = 86400
"""What is stored outlives the session: storage ages by the real clock."""

_MASTER = Broker()
LICENSE, SECRET = _MASTER.license, _MASTER.secret_key
KEY = _MASTER.keygen("a/#/", "rwslp")
GROUP_KEY = _MASTER.keygen("$share/q/a/g/", "r")
OTHER_KEY = _MASTER.keygen("b/", "r")


class Witness(Peer):
    """A subscriber inside the broker, whom no fault befalls."""

    def __init__(self) -> None:
        super().__init__(self._record)
        self.seen: list[tuple[str, bytes]] = []

    def _record(self, kind: Kind, data: bytes) -> None:
        reader = PacketReader()
        reader.feed(data)
        packet = reader.next_packet()
        assert isinstance(packet, Publish)
        self.seen.append((packet.topic, packet.payload))


class Session:
    """
    One session, and what is to be true of it.

    :param broker: where it takes place
    :param lost: called when a link is lost
    :param options: for :func:`emitter_anyio.connect`, as is ``way``
    """

    def __init__(
        self, broker: Broker, *way: str, lost: Callable[[], None] = lambda: None, **options: Any
    ) -> None:
        self.broker = broker
        self.struck = False
        """Whether the fault has come."""
        self.emitter: Emitter = connect(*way, reconnect=Backoff(maximum=1), **options)
        self._lost = lost
        self.errors: list[str] = []
        """The documented errors in which calls have ended."""
        self._witness = Witness()
        broker._exchange.add_subscription(self._witness, broker._topic("a/"))
        self._heard: list[bytes] = []
        self._renewed = ""
        self._number = 0
        self._counted = itertools.count()
        self._marker = b""
        self._proving = anyio.CancelScope()
        self._accepted: set[int] = set()
        self._confirmed: set[int] = set()

    def strike(self) -> None:
        """What goes on while the link is away: somebody publishes, and a key becomes bad."""
        self.struck = True
        self._publish_at_the_broker("a/r/", b"meanwhile")
        if self._renewed:
            self.broker._exchange.ban(self._renewed)

    async def run(self) -> None:
        """Go through the session, and fail if anything is not as it was promised."""
        self.emitter.on("disconnect", self._link_lost)
        self.emitter.on("message", lambda message: self._heard.append(message.binary))
        while True:
            try:
                async with self.emitter:
                    await self._live()
            except ConnectError:
                assert not self._number, "this is for entering alone"
                self.errors.append("enter")
                self._link_lost()
            else:
                break
        with anyio.fail_after(PATIENCE):
            for client in list(self.broker._clients):
                await client.wait_closed()
        await checkpoint()
        self._check_accounts()
        self._check_tables()

    # The session

    async def _live(self) -> None:
        emitter = self.emitter
        async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
            enter = partial(self._enter, stack)
            message = await enter(lambda: emitter.stream("message"))
            changes = await enter(lambda: emitter.stream("presence", channel="a/c/"))
            entered = await enter(lambda: emitter.subscribe(KEY, "a/e/"))
            await self._surely(lambda: emitter.subscribe(KEY, "a/w/", 0))
            group = await enter(lambda: emitter.subscribe(GROUP_KEY, "a/g/", group="q"))
            resumed = await enter(
                lambda: emitter.subscribe(KEY, "a/r/", 0, resume=True, mark_gaps=True)
            )
            resumed_from, links = len(self._witness.seen), emitter.statistics().links
            await self._publish(1, "a/r/", ttl=_LONG)
            by_function = await enter(lambda: emitter.subscribe(self._key, "a/f/", 0))
            feed = await enter(lambda: emitter.watch_presence(KEY, "a/p/"))
            await self._surely(lambda: emitter.presence(KEY, "a/c/", changes=True))
            await self._surely(lambda: emitter.link(KEY, "a/l/", "l1", subscribe=True))
            await self._surely(lambda: tasks.start(self._serve))
            await self._use_every_verb()

            received = await self._proves(
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
            kept = received["a/r/"]
            stored = [
                text for channel, text in self._witness.seen[resumed_from:] if channel == "a/r/"
            ]
            # What came behind the marker, nobody has waited for.
            due = set(stored[: stored.index(self._marker)])
            got = [one for one in kept if isinstance(one, EmitterMessage)]
            missing = due - {one.binary for one in got}
            assert not missing, f"resume=True has lost {missing}"
            for channel, items in received.items():
                live = [one for one in items if type(one) is EmitterMessage]
                numbers = list(_numbers(one.binary for one in live))
                assert numbers == sorted(set(numbers)), f"{channel} has had {numbers}"
            gaps = [one for one in kept if isinstance(one, Gap)]
            assert bool(gaps) == (emitter.statistics().links > links), gaps
            assert all(gap.complete for gap in gaps), gaps
            tasks.cancel_scope.cancel()
        await self._surely(lambda: emitter.unsubscribe(KEY, "a/w/"))
        await self._surely(lambda: emitter.unsubscribe(KEY, "a/l/"))
        await self._surely(lambda: emitter.presence(KEY, "a/c/", changes=False))
        await self._publish(0, "a/e/")
        await self._settle()
        for client in self.broker.clients:
            assert [it for it in client.subscriptions if not it.startswith("a/s/")] == []
            assert not client.peer.watched
        await self._publish(0, "a/e/")

    async def _use_every_verb(self) -> None:
        emitter = self.emitter
        await self._publish(0, "a/e/")
        await self._publish(1, "a/e/")
        await self._call("flush", emitter.flush)
        await self._publish(0, "a/w/")
        await self._publish(0, "a/r/", ttl=_LONG)
        await self._publish(0, None)
        await self._publish(1, None)
        made = await self._call("keygen", lambda: emitter.keygen(SECRET, "b/", "r"))
        assert made is None or made.channel == "b/"
        banned = await self._call("keyban", lambda: emitter.keyban(SECRET, OTHER_KEY))
        assert banned in (None, True)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._call, "me", emitter.me)
            tasks.start_soon(self._publish, 1, "a/f/")
            tasks.start_soon(self._call, "request", partial(self._replies, "now"))
        await self._publish(1, "a/r/", ttl=_LONG)
        stored = await self._call("history", self._read_back)
        assert stored is None or self._confirmed_on_r <= stored

    async def _serve(self, *, task_status: TaskStatus[None]) -> None:
        async def answer(message: EmitterMessage) -> bytes:
            return b"re: " + message.binary

        await self.emitter.serve(KEY, "a/s/", answer, task_status=task_status)

    async def _key(self) -> str:
        made = await self.emitter.keygen(SECRET, "a/f/", "r")
        while made.key in self.broker._exchange.banned:
            # Of 32767 keys that differ in their salt alone, one is what the last one was.
            made = await self.emitter.keygen(SECRET, "a/f/", "r")
        self._renewed = made.key
        return made.key

    async def _read_back(self) -> set[int]:
        stored = self.emitter.history(KEY, "a/r/")
        return set(_numbers([message.binary async for message in stored]))

    # Its calls

    async def _call(self, what: str, verb: Callable[[], Awaitable[T]]) -> T | None:
        """See a call end, in a value or in a documented error."""
        with anyio.fail_after(PATIENCE):
            try:
                return await verb()
            except (ConnectionLostError, RequestTimeoutError):
                self.errors.append(what)
                return None

    async def _surely(self, verb: Callable[[], Awaitable[T]]) -> T:
        """Make a call until it has ended in a value."""
        while True:
            errors = len(self.errors)
            value = await self._call("again", verb)
            if len(self.errors) == errors:
                return value  # type: ignore[return-value]  # it has not failed
            assert errors < 20, "it never comes to an end"

    async def _enter(
        self, stack: AsyncExitStack, make: Callable[[], AbstractAsyncContextManager[T]]
    ) -> T:
        return await self._surely(lambda: stack.enter_async_context(make()))

    async def _publish(self, qos: int, channel: str | None, ttl: int | None = None) -> None:
        self._number += 1
        number, text = self._number, f"#{self._number}"

        async def publish() -> None:
            if channel is None:
                await self.emitter.publish_with_link("l1", text, qos=qos)  # type: ignore[arg-type]
            else:
                await self.emitter.publish(KEY, channel, text, ttl, qos=qos)  # type: ignore[arg-type]
            (self._confirmed if qos else self._accepted).add(number)

        await self._call("publish", publish)
        # On a link that takes nothing it is under way then, and the next one waits behind it.
        await anyio.sleep(0.001)

    # What is to be true

    async def _settle(self) -> None:
        """Wait until there is a link that works, and the broker has given up any other."""
        await self._surely(self.emitter.flush)
        with anyio.fail_after(PATIENCE):
            for client in self.broker.clients[:-1]:
                await client.wait_closed()

    async def _proves(
        self,
        subscribed: Mapping[str, EventStream[Any]],
        watched: Mapping[str, EventStream[PresenceEvent]],
    ) -> Mapping[str, list[object]]:
        """
        Prove that everything works, and once more if the fault has come meanwhile.

        :return: what the subscriptions have received, this time and before
        """
        received: dict[str, list[object]] = {channel: [] for channel in subscribed}

        async def all_works() -> None:
            self._marker = marker = b"marker %d" % next(self._counted)
            guest = Witness()
            again = bool(self.errors) or self.emitter.statistics().links > 1
            for channel in subscribed:
                self._publish_at_the_broker(channel, marker)
            for channel in watched:
                self.broker._exchange.add_subscription(guest, self.broker._topic(f"{channel}x/"))
            if again:
                # On a whole link this has been seen to work before.
                await self.emitter.publish_with_link("l1", marker, qos=1)
                await self._replies("at last")
            for channel, stream in subscribed.items():
                await _until(stream, partial(_is_message, channel, marker), received[channel])
            for stream in watched.values():
                await _until(stream, lambda event: event.who[0].id == guest.id)
            if again:
                await _until(subscribed["a/l/"], partial(_is_message, "a/l/", marker))

        while True:
            await self._settle()
            links = self.emitter.statistics().links
            with anyio.fail_after(PATIENCE), anyio.CancelScope() as self._proving:
                with suppress(ConnectionLostError, RequestTimeoutError):
                    await all_works()
                    return received
            await self._settle()
            assert self.emitter.statistics().links > links, "it does not work, over a whole link"

    def _link_lost(self) -> None:
        self._proving.cancel()
        self._lost()

    async def _replies(self, text: str) -> None:
        reply = await self.emitter.request(KEY, "a/s/", text)
        assert reply.binary == b"re: " + text.encode()

    def _publish_at_the_broker(self, channel: str, payload: bytes) -> None:
        # Not by publish(): in the turn in which the link is cut, nothing can be awaited.
        self.broker._exchange.spread(self.broker._topic(channel), payload, _LONG)

    @property
    def _confirmed_on_r(self) -> set[int]:
        return self._confirmed & set(
            _numbers(text for channel, text in self._witness.seen if channel == "a/r/")
        )

    def _check_accounts(self) -> None:
        delivered = _numbers(text for _, text in self._witness.seen)
        assert delivered == sorted(set(delivered)), f"out of order, or twice: {delivered}"
        assert self._confirmed <= set(delivered), "confirmed, and not delivered"
        lost = self._accepted - set(delivered)
        figures = self.emitter.statistics()
        assert len(lost) <= figures.uncertain + figures.unsent, f"lost in silence: {lost}"
        assert figures.pending == 0
        assert figures.queued_bytes == 0
        assert figures.nonsense == 0
        assert figures.dropped == 0
        assert self._marker in self._heard

    def _check_tables(self) -> None:
        """What no public figure tells: nothing may be kept for ever."""
        assert self.emitter.state == "closed"
        kept = tables(self.emitter)
        kept.pop("Events._registrations", None)
        assert not kept, kept
        assert not self.broker._clients


async def _until(
    stream: EventStream[T], wanted: Callable[[T], bool], received: list[object] | None = None
) -> None:
    async for item in stream:
        if received is not None:
            received.append(item)
        if wanted(item):
            return
    raise AssertionError(f"{stream} has ended")


def _is_message(channel: str, payload: bytes, item: object) -> bool:
    return isinstance(item, EmitterMessage) and (item.channel, item.binary) == (channel, payload)


def _numbers(texts: Iterable[bytes]) -> list[int]:
    return [int(text[1:]) for text in texts if text.startswith(b"#")]


@asynccontextmanager
async def broker_in_memory(connectable: MemoryConnectable) -> AsyncGenerator[Broker]:
    """Run a broker that is reached by a connectable."""
    broker = Broker(license=LICENSE)
    # To decipher the same few keys again and again would take a tenth of the time.
    broker._exchange._grant = _MASTER._exchange._grant

    async def accept() -> None:
        while True:
            tasks.start_soon(broker._serve, await connectable.accept())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(accept)
        yield broker
        tasks.cancel_scope.cancel()
    connectable.close()


class _FaultyConnectable(MemoryConnectable):
    """Its first link fails, and so does the first try to have another one; then all is whole."""

    def __init__(self, fault: Fault | None, then: Callable[[], None]) -> None:
        super().__init__(capacity=512, before=self._refuse)
        self._fault = fault
        self._then = then

    async def _refuse(self, attempt: int) -> None:
        if attempt == 2:
            raise ConnectionRefusedError("the broker is not back yet")

    async def connect(self) -> MemoryStream:
        stream = await super().connect()
        if self._fault is not None and self.attempts == 1:
            self._fault.strikes(stream, self._then)
        return stream


async def run_session(fault: Fault | None = None) -> MemoryStream:
    """
    Run one session over links in memory.

    :return: the client's end of the first link
    """
    connectable = _FaultyConnectable(fault, lambda: session.strike())  # noqa: PLW0108 - made below
    async with broker_in_memory(connectable) as broker:
        session = Session(broker, connectable=connectable)
        await session.run()
    assert all(stream.closed for stream in connectable.streams)
    assert session.struck is (fault is not None), "the fault has not come"
    return connectable.streams[0]


async def measure() -> dict[Direction, int]:
    """Tell how many bytes a whole session has each way."""
    stream = await run_session()
    return {"to_broker": stream._out.taken, "to_client": stream._in.taken}


async def run_sessions(faults: Iterable[Fault]) -> None:
    """Run a session for each fault, all at once, and fail with what has gone wrong in any."""
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
        raise ExceptionGroup(f"{len(failures)} sessions", failures[:5])
