"""Numbered messages between clients of all nodes, and the account of each one."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from time import monotonic
from typing import Final, Literal

import anyio

from emitter_anyio import (
    Backoff,
    ConnectionLostError,
    Emitter,
    EmitterMessage,
    EventStream,
    Gap,
    RequestTimeoutError,
    connect,
)
from tests.soak.accounting import Account, Accounting

from .driver import Cluster

PACE_SECONDS: Final = 0.01
WAIT_SECONDS: Final = 100.0
"""The longest time without traffic. A real node reconnects to others within 35 seconds."""
TTL: Final = 3600
BUFFER: Final = 10**5
"""The number of messages that are buffered. A node sends thousands together after a pause."""


def connect_in_turn(servers: list[str], username: str = "") -> Emitter:
    """
    Create a client that notices a silent node soon.

    A node that gets no answer from the others takes 2 seconds for each SUBSCRIBE, and answers pings
    only after that.
    """
    return connect(
        servers=servers,
        username=username or None,
        keepalive=4,
        connect_timeout=3,
        request_timeout=15,
        disconnect_timeout=1,
        reconnect=Backoff(initial=0.02, maximum=0.5),
    )


class Station:
    """
    A client that publishes numbered messages and receives those of all stations.

    :param index: its number, from 0
    :param servers: the nodes, in the order in which it tries them
    :param note: a function that writes a line of the journal
    """

    def __init__(
        self, index: int, servers: list[str], key: str, channel: str, note: Callable[..., None]
    ) -> None:
        self.index = index
        self.accepted = 0
        """The number of messages with QoS 1 that the broker has accepted."""
        self.newest: dict[int, int] = {}
        """By station: the newest number that this one has received live."""
        self.stored: dict[str, str] = {}
        """The accepted messages that a node stores, with the URL of the node."""
        self.emitter: Emitter = connect_in_turn(servers, f"station-{index}")
        self.number = 0
        self._servers = servers
        self._key = key
        self._channel = channel
        self._note = note
        self.emitter.on("connect", self._note_node)
        self.emitter.on("disconnect", self.note_losses)
        self.emitter.on("error", self._ignore_documented)

    async def receive(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Receive in two ways: with missed messages read back, and without."""
        subscribe = partial(
            self.emitter.subscribe, self._key, self._channel, 0, mark_gaps=True, buffer=BUFFER
        )
        async with (
            subscribe(resume=True, resume_limit=10**6) as kept,
            subscribe() as plain,
            anyio.create_task_group() as tasks,
        ):
            for stream, kind in ((kept, "kept"), (plain, "plain")):
                name = f"{self.index}.{kind}"
                self._note("O", name, kind, self._channel)
                tasks.start_soon(self._read, stream, name)
            self._note_node()
            task_status.started()

    async def publish_forever(self) -> None:
        """Publish, alternating the QoS, and storing two of three messages."""
        for number in itertools.count():
            await self.publish(1 if number % 2 else 0, TTL if number % 3 else None)
            await anyio.sleep(PACE_SECONDS)

    async def publish(self, qos: Literal[0, 1], ttl: int | None) -> bool:
        """Publish the next message, and return whether the call succeeded."""
        self.number += 1
        self._note("P", self.index, self.number, qos, int(ttl is not None))
        text, outcome = f"{self.index} {self.number}", "cancelled"
        try:
            await self.emitter.publish(self._key, self._channel, text, ttl, qos=qos)
            outcome = "ok"
        except (ConnectionLostError, RequestTimeoutError) as exc:
            outcome = type(exc).__name__
        finally:
            self._note("A", self.index, self.number, outcome)
        if outcome == "ok" and qos:
            self.accepted += 1
            connection = self.emitter.connection
            if ttl is not None and connection is not None:
                self.stored[text] = connection.server
        return outcome == "ok"

    def note_losses(self) -> None:
        """Write to the journal that the client is not connected, and the losses it has counted."""
        self._note("C", self.index, "none")
        figures = self.emitter.statistics()
        self._note("L", self.index, figures.uncertain, figures.unsent)

    def _note_node(self) -> None:
        connection = self.emitter.connection
        self._note("C", self.index, connection.server if connection is not None else "none")

    def _ignore_documented(self, error: Exception) -> None:
        if not isinstance(error, ConnectionLostError | RequestTimeoutError):
            raise error

    async def _read(self, stream: EventStream[EmitterMessage | Gap], name: str) -> None:
        async for item in stream:
            if isinstance(item, Gap):
                self._note("G", name, int(item.complete))
                continue
            station, number = map(int, item.as_string().split())
            self._note("R", name, station, number, int(item.replayed))
            if not item.replayed:
                self.newest[station] = max(number, self.newest.get(station, 0))


class Traffic:
    """
    A station for each node, until the block ends.

    :param key: a key for the channel
    """

    def __init__(self, cluster: Cluster, key: str, channel: str) -> None:
        self._cluster = cluster
        self._journal: list[str] = []
        self.stations = [
            Station(index, cluster.servers_from(index), key, channel, self._note)
            for index in range(len(cluster.urls))
        ]

    @asynccontextmanager
    async def flowing(self) -> AsyncGenerator[None]:
        """Publish until the block ends, and then let everything arrive."""
        async with anyio.create_task_group() as clients:
            for station in self.stations:
                await clients.start(self._run, station)
            async with anyio.create_task_group() as publishers:
                for station in self.stations:
                    publishers.start_soon(station.publish_forever)
                await self.all_arrive()
                yield
                await self.all_arrive()
                publishers.cancel_scope.cancel()
            for station in self.stations:
                while not await station.publish(1, TTL):
                    pass
            await self._await(self._all_newest_arrived)
            clients.cancel_scope.cancel()
        for station in self.stations:
            station.note_losses()

    async def flow(self, count: int = 10) -> None:
        """Wait until each station has published further messages that were accepted."""
        goal = [station.accepted + count for station in self.stations]
        await self._await(
            lambda: all(it.accepted >= n for it, n in zip(self.stations, goal, strict=True))
        )

    async def all_arrive(self) -> None:
        """Wait until each station has received a message that each of them publishes from now."""
        after = {station.index: station.number for station in self.stations}
        await self._await(
            lambda: all(
                station.newest.get(index, 0) > number
                for station in self.stations
                for index, number in after.items()
            )
        )

    @asynccontextmanager
    async def fault(self) -> AsyncGenerator[None]:
        """
        Let a fault of the cluster occur in the block, and repair the cluster.

        Nodes might have forgotten each other's subscriptions, so all of them are restarted.
        """
        began = monotonic()
        yield
        await self._cluster.reset()
        await self.all_arrive()
        self._note("X", f"{began:.4f}")

    def account(self) -> Account:
        """Return the account of all messages."""
        return Accounting().read(self._journal)

    @property
    def stored(self) -> set[str]:
        """The messages that nodes have accepted and stored."""
        return {text for station in self.stations for text in station.stored}

    def erased(self, url: str, began: float) -> None:
        """Expect no messages that a node has stored, because its storage has been deleted."""
        for station in self.stations:
            for text in [text for text, server in station.stored.items() if server == url]:
                del station.stored[text]
        self._note("K", f"{began:.4f}")

    async def _run(self, station: Station, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with station.emitter:
            await station.receive(task_status=task_status)

    def _all_newest_arrived(self) -> bool:
        return all(
            station.newest.get(other.index) == other.number
            for station in self.stations
            for other in self.stations
        )

    async def _await(self, condition: Callable[[], bool]) -> None:
        with anyio.move_on_after(WAIT_SECONDS):
            while not condition():
                await anyio.sleep(PACE_SECONDS)
            return
        states = [
            f"{station.emitter.connection} published {station.number}, accepted "
            f"{station.accepted}, received {station.newest}"
            for station in self.stations
        ]
        raise AssertionError("\n".join(["the stations do not advance:", *states]))

    def _note(self, letter: str, *fields: object) -> None:
        self._journal.append(" ".join(map(str, (f"{monotonic():.4f}", letter, *fields))))
