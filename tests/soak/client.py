"""A client of the soak test: it publishes, subscribes, makes requests, leaves and returns."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from time import monotonic
from typing import Any, Final, Literal, TextIO
from urllib.parse import urlsplit

import anyio
from anyio.abc import ByteStream, ByteStreamConnectable

from emitter_anyio import (
    Backoff,
    ConnectionLostError,
    ConnectOptions,
    Emitter,
    EmitterError,
    EmitterMessage,
    Gap,
    HistoryIncompleteError,
    RequestTimeoutError,
    SlowConsumerError,
    connect,
)

HUNG_SECONDS: Final = 90.0
"""A call that takes longer counts as hung; every fault ends long before."""
LAST_MARK_SECONDS: Final = 5.0
"""The time after which a client publishes its last message again."""
TTL: Final = 600
_LAST_MARK: Final = "last"
_DOCUMENTED: Final = (ConnectionLostError, RequestTimeoutError)
"""The errors that a valid call may raise when the connection or the broker fails."""


class JammedStream(ByteStream):
    """A stream that sometimes blocks in ``send()`` for seconds, so that packets queue up."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    async def send(self, item: bytes) -> None:
        if random.random() < 0.05:
            await anyio.sleep(random.uniform(0, 4))
        await self._stream.send(item)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        return await self._stream.receive(max_bytes)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


class JammedConnectable(ByteStreamConnectable):
    """
    Opens jammed streams.

    :param port: the port to connect to
    """

    def __init__(self, port: int) -> None:
        self._port = port

    async def connect(self) -> ByteStream:
        return JammedStream(await anyio.connect_tcp("127.0.0.1", self._port))


@dataclass
class Run:
    """
    The state that all clients of a run share.

    :ivar key: a key for all channels
    :ivar ports: the ports of the proxies, each in front of the next node
    :ivar nodes: the number of nodes, or 1 for a broker without a cluster
    :ivar pace: the mean number of seconds between two bursts of a client
    """

    key: str
    secret: str
    seed: int
    ports: list[int]
    rooms: int
    pace: float
    journal: TextIO
    nodes: int = 1
    breaches: list[str] = field(default_factory=list)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    messages: int = 0
    numbers: count[int] = field(default_factory=count)
    quiet: anyio.Event = field(default_factory=anyio.Event)
    """Set when clients should stop publishing and leaving."""
    steady: anyio.Event = field(default_factory=anyio.Event)
    """Set when all clients are connected and stay so."""
    receiving: set[int] = field(default_factory=set)
    """The clients that have not received all last messages."""
    all_received: anyio.Event = field(default_factory=anyio.Event)

    def note(self, letter: str, *fields: object) -> None:
        """Write a line to the journal."""
        words = " ".join(map(str, (letter, *fields)))
        self.journal.write(f"{monotonic():.4f} {words}\n")

    @property
    def documented(self) -> tuple[type[EmitterError], ...]:
        """The errors that a valid call may raise when a connection or a node fails."""
        return _DOCUMENTED if self.nodes == 1 else (*_DOCUMENTED, HistoryIncompleteError)

    def breach(self, text: str) -> None:
        """Record a violation of what the client promises."""
        self.breaches.append(text)


class Client:
    """
    A client of the run.

    :param index: its number, from 0
    :param members: the number of clients that share its channel
    """

    def __init__(self, run: Run, index: int, members: int) -> None:
        self.run = run
        self.index = index
        run.receiving.add(index)
        self.subscribed = False
        """Whether all of its subscriptions are active."""
        self.finished = False
        ports = [run.ports[(index + node) % len(run.ports)] for node in range(run.nodes)]
        self._jammed = index % 5 == 3
        options: ConnectOptions = {
            "username": f"client-{index}",
            "keepalive": 5,
            "connect_timeout": 5,
            "request_timeout": 5,
            "disconnect_timeout": 3,
            "reconnect": Backoff(initial=0.1, maximum=1),
        }
        if self._jammed:
            options["connectable"] = JammedConnectable(ports[0])
        else:
            options["servers"] = [f"mqtt://127.0.0.1:{port}" for port in ports]
        self._own_port = ports[0]
        self.emitter: Emitter = connect(options)
        self._random = random.Random(f"{run.seed} {index}")
        self._room = f"soak/{index % run.rooms}/"
        self._members = members
        self._number = 0
        self._heard = ""
        self._lasts: dict[str, set[int]] = {}
        self._all_last = anyio.Event()
        self.emitter.on("message", self._hear, channel=self._room)
        self.emitter.on("connect", self._note_node)
        self.emitter.on("disconnect", self._note_figures)
        self.emitter.on("error", self._note_error)

    async def live(self) -> None:
        """Run until everything has arrived, entering the client again after each end."""
        while not self.finished:
            try:
                async with self.emitter:
                    await self._stay_subscribed()
            except EmitterError as exc:
                self._count("connect", exc)
                await anyio.sleep(self._random.uniform(0.1, 0.5))
            finally:
                self.subscribed = False
                self._note_figures()

    async def _stay_subscribed(self) -> None:
        kept_as, plain_as, self._heard = (f"{self.index}.{next(self.run.numbers)}" for _ in "123")
        self._lasts = {kept_as: set(), plain_as: set(), self._heard: set()}
        for name, kind in ((kept_as, "kept"), (plain_as, "plain"), (self._heard, "heard")):
            self.run.note("O", name, kind, self._room)
        emitter, key = self.emitter, self.run.key
        await emitter.subscribe(key, self._room, 0, resume=True, resume_limit=100000)
        async with (
            emitter.subscribe(
                *(key, self._room, 0), resume=True, resume_limit=100000, mark_gaps=True
            ) as kept,
            emitter.subscribe(key, self._room, 0, mark_gaps=True) as plain,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(self._read, kept, kept_as)
            tasks.start_soon(self._read, plain, plain_as)
            tasks.start_soon(self._make_other_calls)
            self.subscribed = True
            stay = self._random.expovariate(1 / 60) if self._random.random() < 0.5 else 1e9
            with anyio.move_on_after(stay):
                await self._publish_until_quiet()
            if self.run.quiet.is_set():
                await self._receive_last()
            # Leaving does not wait for a resumption, so handlers get the held messages without it.
            self._heard = ""
            tasks.cancel_scope.cancel()

    # Publishing

    async def _publish_until_quiet(self) -> None:
        while not self.run.quiet.is_set():
            with anyio.move_on_after(self._random.expovariate(1 / self.run.pace)):
                await self.run.quiet.wait()
            ttl = TTL if self._random.random() < 0.75 else None
            if self._jammed and self._random.random() < 0.05:
                for _ in range(60):
                    await self._publish(0, ttl, size=2048)
            for _ in range(self._random.choice((1, 1, 2, 3))):
                patience = self._random.random() * 0.05 if self._random.random() < 0.05 else 1e9
                with anyio.move_on_after(patience):
                    await self._publish(self._random.choice((0, 1)), ttl)

    async def _publish(
        self, qos: Literal[0, 1], ttl: int | None, mark: str = "-", size: int = 0
    ) -> str:
        self._number += 1
        number = self._number
        self.run.note("P", self.index, number, qos, int(ttl is not None))
        payload = f"{self.index} {number} {mark} ".ljust(size, ".")
        publish = partial(self.emitter.publish, self.run.key, self._room, payload, ttl, qos=qos)
        outcome = "cancelled"
        try:
            outcome = await self._call(f"publish qos={qos}", publish)
        finally:
            self.run.note("A", self.index, number, outcome)
        return outcome

    async def _receive_last(self) -> None:
        await self.run.steady.wait()
        with anyio.move_on_after(HUNG_SECONDS):
            while not self.run.all_received.is_set():
                # A stream that waits for stored messages has a limited buffer, and might drop one.
                await self._publish(1, TTL, _LAST_MARK)
                with anyio.move_on_after(LAST_MARK_SECONDS):
                    await self._all_last.wait()
                    self.run.receiving.discard(self.index)
                    if not self.run.receiving:
                        self.run.all_received.set()
                    await self.run.all_received.wait()
            self.finished = True
            return
        self.finished = True
        for name, seen in self._lasts.items():
            if len(seen) < self._members:
                self.run.breach(f"stream {name} received last messages only from {sorted(seen)}")

    # Receiving

    async def _read(self, stream: Any, name: str) -> None:
        while True:
            try:
                item = await stream.receive()
            except anyio.EndOfStream:
                break
            except SlowConsumerError as exc:
                self._count("receive", exc)
                self.run.note("G", name, 0)
            except EmitterError as exc:
                self.run.breach(f"stream {name} raised {exc!r}")
                break
            else:
                if isinstance(item, Gap):
                    self.run.note("G", name, int(item.complete))
                else:
                    self._take(item, name)

    def _hear(self, message: EmitterMessage) -> None:
        if self._heard:
            self._take(message, self._heard)

    def _take(self, message: EmitterMessage, name: str) -> None:
        publisher, number, mark, *_ = message.as_string().split(" ")
        self.run.messages += 1
        self.run.note("R", name, publisher, number, int(message.replayed))
        if mark == _LAST_MARK:
            self._lasts[name].add(int(publisher))
            if all(len(seen) == self._members for seen in self._lasts.values()):
                self._all_last.set()

    # Other calls

    async def _make_other_calls(self) -> None:
        emitter, key, room = self.emitter, self.run.key, self._room
        calls: list[tuple[str, Callable[[], Awaitable[object]]]] = [
            ("flush", emitter.flush),
            ("me", emitter.me),
            ("presence", partial(emitter.presence, key, room)),
            ("keygen", partial(emitter.keygen, self.run.secret, room, "r")),
            ("history", self._read_history),
            ("watch_presence", self._watch),
            ("subscribe", self._subscribe_briefly),
        ]
        while not self.run.quiet.is_set():
            with anyio.move_on_after(self._random.expovariate(1 / 10)):
                await self.run.quiet.wait()
            name, call = self._random.choice(calls)
            patience = self._random.random() * 0.02 if self._random.random() < 0.1 else 1e9
            with anyio.move_on_after(patience):
                await self._call(name, call)

    async def _read_history(self) -> None:
        async for _ in self.emitter.history(self.run.key, self._room, 10):
            pass

    async def _watch(self) -> None:
        async with self.emitter.watch_presence(self.run.key, self._room, refresh=1) as feed:
            with anyio.move_on_after(2):
                async for _ in feed:
                    pass

    async def _subscribe_briefly(self) -> None:
        async with self.emitter.subscribe(self.run.key, f"{self._room}aside/", 1):
            await anyio.sleep(1)

    async def _call(self, name: str, call: Callable[[], Awaitable[object]]) -> str:
        """Make a call, and return how it ended."""
        outcome = "cancelled"
        try:
            with anyio.move_on_after(HUNG_SECONDS) as scope:
                await call()
                outcome = "ok"
            if scope.cancelled_caught:
                outcome = "hung"
                self.run.breach(f"{name} of client {self.index} took more than {HUNG_SECONDS:g} s")
        except EmitterError as exc:
            outcome = type(exc).__name__
            if not isinstance(exc, self.run.documented):
                self.run.breach(f"{name} of client {self.index} raised {exc!r}")
        except Exception as exc:
            outcome = type(exc).__name__
            self.run.breach(f"{name} of client {self.index} raised {exc!r}")
        finally:
            self.run.calls[name, outcome] += 1
        return outcome

    def _count(self, name: str, exc: Exception) -> None:
        self.run.calls[name, type(exc).__name__] += 1

    def _note_figures(self) -> None:
        if self.run.nodes > 1:
            self.run.note("C", self.index, "none")
        figures = self.emitter.statistics()
        self.run.note("L", self.index, figures.uncertain, figures.unsent)

    def _note_node(self) -> None:
        connection = self.emitter.connection
        if self.run.nodes > 1 and connection is not None:
            port = urlsplit(connection.server).port if not self._jammed else None
            port = port or self._own_port
            self.run.note("C", self.index, self.run.ports.index(port) % self.run.nodes)

    def _note_error(self, exc: Exception) -> None:
        self._count("on error", exc)
        if isinstance(exc, SlowConsumerError) and self.run.nodes > 1:
            # Handlers wait for stored messages while nodes are away, with a limited buffer.
            self.run.note("W", self._room)
        elif not isinstance(exc, self.run.documented):
            self.run.breach(f"client {self.index}: on('error') got {exc!r}")
