"""
Who is here, on this server and on all others that share the broker.

Emitter's presence knows connections, and a server has one for all of its browsers. So each server
says who is on it, and presence tells when a server has come, which must hear that, or is gone.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from emitter_anyio import Emitter

CHANNEL = "webchat/people/"


class People:
    def __init__(self, server: str, emitter: Emitter, key: str) -> None:
        self.server, self.emitter, self.key = server, emitter, key
        self.changed, self._news = anyio.Event(), anyio.Event()
        self._here: Counter[str] = Counter()
        self._elsewhere: dict[str, list[str]] = {}

    @staticmethod
    def new_server() -> str:
        """Make the user name by which a server is known to the others."""
        return uuid.uuid4().hex

    @property
    def names(self) -> list[str]:
        return sorted({*+self._here}.union(*self._elsewhere.values()), key=str.casefold)

    @contextmanager
    def visit(self, name: str) -> Iterator[None]:
        """Have somebody here for as long as the block lasts."""
        self._here[name] += 1
        self._note()
        try:
            yield
        finally:
            self._here[name] -= 1
            self._note()

    def show(self) -> None:
        """Wake those who wait for ``changed``."""
        self.changed.set()
        self.changed = anyio.Event()

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            for task in (self._tell_others, self._hear_others, self._watch_others):
                tasks.start_soon(task)

    def _note(self) -> None:
        self.show()
        self._news.set()

    async def _tell_others(self) -> None:
        while True:
            await self._news.wait()
            self._news = anyio.Event()
            where = f"{CHANNEL}{self.server}/"
            await self.emitter.publish(self.key, where, [*+self._here], echo=False)

    async def _hear_others(self) -> None:
        async with self.emitter.subscribe(self.key, CHANNEL, last=0) as lists:
            async for message in lists:
                self._elsewhere[message.channel.split("/")[-2]] = message.as_object()
                self.show()

    async def _watch_others(self) -> None:
        async with self.emitter.watch_presence(self.key, CHANNEL) as servers:
            async for _ in servers:
                there = {member.username for member in servers.members.values()}
                for gone in self._elsewhere.keys() - there:
                    del self._elsewhere[gone]
                self._note()
