"""The checks of ``doctor`` for each permission of a channel key."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import anyio

from emitter_anyio import (
    Emitter,
    EmitterMessage,
    EventStream,
    HistoryIncompleteError,
    NotFoundError,
    RequestError,
    RequestTimeoutError,
    StoredMessage,
    UnauthorizedError,
)

from ._arguments import NAME
from ._formats import to_json
from ._output import counted
from ._report import Report, Status

PERMISSIONS: Final = {
    "p": "see presence",
    "l": "load stored messages",
    "r": "read",
    "w": "write",
    "s": "store",
    "e": "extend to private channels",
}

_PROBE_TTL_SECONDS: Final = 5


class KeyChecks:
    """
    Checks the permissions of a key on a channel.

    :param emitter: a connected client
    :param report: receives the result of each check
    :param key: the channel key
    :param channel: the channel
    :param needed: the letters of the required permissions; if empty, any one permission is enough
    :param probe: whether to publish a message; ``None`` publishes unless presence shows subscribers
    :param delivery_timeout: the time to wait for the published message in seconds
    """

    def __init__(
        self,
        emitter: Emitter,
        report: Report,
        key: str,
        channel: str,
        *,
        needed: str,
        probe: bool | None,
        delivery_timeout: float,
    ) -> None:
        self._emitter = emitter
        self._report = report
        self._key = key
        self._channel = channel
        self._needed = needed
        self._probe = probe
        self._delivery_timeout = delivery_timeout
        self._payload = to_json({"emitter-anyio doctor": secrets.token_hex(8)}).encode()
        self._writes = not needed or bool({*needed} & {*"ws"})
        self._published = False
        self._held: set[str] = set()
        self._others = 0
        self.ahead: float | None = None
        """The seconds by which the broker's clock is ahead of the local one, if known."""

    @property
    def can_load(self) -> bool:
        """Whether the key has permission l, once it was checked."""
        return "l" in self._held

    async def run(self) -> None:
        """Check each permission."""
        await self._check("p", self._presence)
        await self._check("l", self._load)
        await self._check("r", self._read)
        if self._writes:
            if "r" not in self._held:
                await self._check("w", self._write)
            await self._check("s", self._store)
        await self._check("e", self._extend)
        if not self._held and not self._needed:
            self._report.add(
                "key",
                "failed",
                f"no permission on {self._channel}",
                "the key might have expired, be banned, or be for another channel or broker; use "
                f"{NAME} keygen to generate a new one",
            )

    async def _check(self, letter: str, attempt: Callable[[], Awaitable[str]]) -> None:
        try:
            text = await attempt()
        except (RequestError, ValueError) as exc:
            self._add_refused(letter, exc)
        except RequestTimeoutError as exc:
            self._add(letter, "failed", str(exc))
        else:
            if text:
                self._add(letter, "ok", text)

    def _add(self, letter: str, status: Status, text: str, fix: str = "") -> None:
        self._report.add(f"key {letter}", status, text, fix)

    def _add_refused(self, letter: str, exc: Exception) -> None:
        text = f"no permission to {PERMISSIONS[letter]}"
        if not isinstance(exc, UnauthorizedError | NotFoundError):
            text = f"{text}: {exc}"
        if letter in self._needed:
            fix = f"generate a key with {NAME} keygen {self._channel} {self._needed}"
            self._add(letter, "failed", text, fix)
        else:
            self._add(letter, "note", text)

    async def _presence(self) -> str:
        before = time.time()
        status = await self._emitter.presence(self._key, self._channel)
        self._held.add("p")
        self._compare_clocks(status.time.timestamp(), before)
        self._others = len(status.who)
        subscribers = counted(self._others, "subscriber")
        return f"permission to see presence: {subscribers} on {self._channel}"

    async def _load(self) -> str:
        found = await self._read_history(1)
        self._held.add("l")
        stored = "at least one is stored" if found else "none is stored"
        return f"permission to load stored messages: {stored}"

    async def _read(self) -> str:
        async with self._emitter.subscribe(
            self._key, self._channel, last=0, overflow="drop_oldest"
        ) as messages:
            self._held.add("r")
            self._add("r", "ok", "permission to read: the broker accepted a subscription")
            if self._writes:
                await self._check("w", partial(self._write, messages))
        return ""

    async def _write(self, messages: EventStream[EmitterMessage] | None = None) -> str:
        if self._probe is False or (self._probe is None and self._others):
            subscribers = counted(self._others, "subscriber")
            reason = f"the channel has {subscribers}" if self._others else "--no-probe was given"
            status: Status = "failed" if "w" in self._needed else "skipped"
            self._add(
                "w", status, f"no message was published: {reason}", "use --probe to publish one"
            )
            return ""
        start = time.perf_counter()
        await self._emitter.publish(
            self._key, self._channel, self._payload, _PROBE_TTL_SECONDS, qos=1
        )
        self._held.add("w")
        self._published = True
        if messages is not None:
            with anyio.move_on_after(self._delivery_timeout):
                while (await messages.receive()).binary != self._payload:
                    pass
                took = f"{(time.perf_counter() - start) * 1e3:.1f} ms"
                return f"permission to write: a message was delivered in {took}"
            self._report.add(
                "delivery",
                "failed",
                "the broker accepted a message, but did not deliver it within "
                f"{self._delivery_timeout:g} s",
                "try another channel, or restart the broker",
            )
        return "permission to write: the broker accepted a message"

    async def _store(self) -> str:
        if not self._published or "l" not in self._held:
            status: Status = "failed" if "s" in self._needed else "skipped"
            self._add("s", status, "cannot be checked without permissions w and l")
            return ""
        for message in await self._read_history(10):
            if message.binary == self._payload:
                self._held.add("s")
                self._compare_clocks(message.time.timestamp(), time.time())
                return f"permission to store: the message is stored for {_PROBE_TTL_SECONDS} s"
        raise ValueError("the broker accepted a message, but did not store it")

    async def _read_history(self, last: int) -> list[StoredMessage]:
        """Return the newest stored messages that can be read; ``history`` reports missing nodes."""
        reading = self._emitter.history(self._key, self._channel, last, order="newest")
        found = []
        while True:
            try:
                found.append(await anext(reading))
            except HistoryIncompleteError:
                continue
            except StopAsyncIteration:
                return found

    async def _extend(self) -> str:
        made = await self._emitter.keygen(self._key, self._channel, "", ttl=1)
        self._held.add("e")
        return f"permission to extend to private channels, such as {made.channel}"

    def _compare_clocks(self, broker_time: float, before: float) -> None:
        # Add half a second, because the broker reports whole seconds.
        if self.ahead is None:
            self.ahead = broker_time + 0.5 - (before + time.time()) / 2
