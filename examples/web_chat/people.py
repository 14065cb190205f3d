"""
Who is here, on this server and on all others that share the broker.

Emitter's presence knows connections, and a server has one for all of its browsers. So each server
says who is on it, and presence tells when a server has come, which must hear that, or is gone.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import anyio

from emitter_anyio import Emitter

CHANNEL = "webchat/people/"
PAUSE = 0.5  # seconds: of those who come within it, everybody gets one list and not one for each
PART = 200  # names in one message, which has at most 64 KiB


class People:
    def __init__(self, server: str, emitter: Emitter, key: str) -> None:
        self.server, self.emitter, self.key = server, emitter, key
        self.changed, self._news = anyio.Event(), anyio.Event()
        self._here: Counter[str] = Counter()
        self._elsewhere: dict[str, list[str]] = {}
        self._names: list[str] | None = None

    @staticmethod
    def new_server() -> str:
        """Make the user name by which a server is known to the others."""
        return uuid.uuid4().hex

    @property
    def names(self) -> list[str]:
        if self._names is None:
            everybody = {*+self._here}.union(*self._elsewhere.values())
            self._names = sorted(everybody, key=str.casefold)
        return self._names

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
        self._names = None
        self.changed.set()
        self.changed = anyio.Event()

    async def gather(self) -> None:
        """Let more changes come, before all of them are told."""
        await anyio.sleep(PAUSE)

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
            names = [*+self._here]
            for start in range(0, max(len(names), 1), PART):
                part = {"start": start, "names": names[start : start + PART]}
                await self.emitter.publish(self.key, where, part, echo=False)
            await self.gather()

    async def _hear_others(self) -> None:
        async with self.emitter.subscribe(self.key, CHANNEL, last=0) as lists:
            async for message in lists:
                with suppress(ValueError):  # whoever has a key may publish anything
                    self._hear(message.channel.split("/")[-2], message.as_object())

    def _hear(self, server: str, part: object) -> None:
        match part:
            case {"start": int(start), "names": [*names]} if all(isinstance(n, str) for n in names):
                known = self._elsewhere.setdefault(server, [])
                known[start:] = names
                self.show()

    async def _watch_others(self) -> None:
        async with self.emitter.watch_presence(self.key, CHANNEL) as servers:
            async for _ in servers:
                there = {member.username for member in servers.members.values()}
                for gone in self._elsewhere.keys() - there:
                    del self._elsewhere[gone]
                self._note()
