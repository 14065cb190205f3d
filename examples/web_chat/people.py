"""
The names of all members, on this server and on others that share the broker.

Emitter's presence lists connections, and each server has one connection for all of its browsers.
So each server publishes the names of its members, and publishes them again when presence shows a
new server. When presence shows that a server has left, the others remove its members.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import anyio

from emitter_anyio import ChannelKey, Emitter

CHANNEL = "webchat/people/"
PAUSE = 0.5  # seconds between two lists of names, which combines changes
PART = 200  # names in one message, to stay below the limit of 64 KiB


class People:
    """
    The names of all members.

    :ivar changed: an event that is set, and replaced, after each change
    """

    def __init__(self, server: str, emitter: Emitter, key: ChannelKey) -> None:
        self.server, self.emitter, self.key = server, emitter, key
        self.changed, self._publish = anyio.Event(), anyio.Event()
        self._local: Counter[str] = Counter()
        self._remote: dict[str, list[str]] = {}
        self._names: list[str] | None = None

    @staticmethod
    def new_server() -> str:
        """Return a new user name, by which the other servers identify this one."""
        return uuid.uuid4().hex

    @property
    def names(self) -> list[str]:
        """The sorted names of all members."""
        if self._names is None:
            names = {*+self._local}.union(*self._remote.values())
            self._names = sorted(names, key=str.casefold)
        return self._names

    @contextmanager
    def visit(self, name: str) -> Iterator[None]:
        """Add a member until the block ends."""
        self._local[name] += 1
        self._local_changed()
        try:
            yield
        finally:
            self._local[name] -= 1
            self._local_changed()

    def notify(self) -> None:
        """Set ``changed``."""
        self._names = None
        self.changed.set()
        self.changed = anyio.Event()

    async def pause(self) -> None:
        """Wait for further changes, to send them together."""
        await anyio.sleep(PAUSE)

    async def run(self) -> None:
        """Exchange names with the other servers until cancelled."""
        async with anyio.create_task_group() as tasks:
            for task in (self._publish_names, self._receive_names, self._watch_servers):
                tasks.start_soon(task)

    def _local_changed(self) -> None:
        self.notify()
        self._publish.set()

    async def _publish_names(self) -> None:
        while True:
            await self._publish.wait()
            self._publish = anyio.Event()
            channel = f"{CHANNEL}{self.server}/"
            names = [*+self._local]
            for start in range(0, max(len(names), 1), PART):
                part = {"start": start, "names": names[start : start + PART]}
                await self.emitter.publish(self.key, channel, part, echo=False)
            await self.pause()

    async def _receive_names(self) -> None:
        async with self.emitter.subscribe(self.key, CHANNEL, last=0) as lists:
            async for message in lists:
                with suppress(ValueError):  # anyone with a key can publish any bytes
                    self._update(message.channel.split("/")[-2], message.as_object())

    def _update(self, server: str, part: object) -> None:
        match part:
            case {"start": int(start), "names": [*names]} if all(isinstance(n, str) for n in names):
                known = self._remote.setdefault(server, [])
                known[start:] = names
                self.notify()

    async def _watch_servers(self) -> None:
        async with self.emitter.watch_presence(self.key, CHANNEL) as servers:
            async for _ in servers:
                present = {member.username for member in servers.members.values()}
                for server in self._remote.keys() - present:
                    del self._remote[server]
                self._local_changed()
