"""The doctor's look at a key: each right in turn, as gently as it can be tried."""

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
    NotFoundError,
    RequestError,
    RequestTimeoutError,
    UnauthorizedError,
)

from ._arguments import NAME
from ._findings import Report, Verdict
from ._formats import to_json

RIGHTS: Final = {
    "p": "see who is there",
    "l": "load what is stored",
    "r": "read",
    "w": "write",
    "s": "store",
    "e": "extend to private channels",
}

_KEPT: Final = 5
"""For so many seconds the probe is stored."""


class Examination:
    """
    Tries what a key permits on a channel.

    :param emitter: a client
    :param report: where each right is told
    :param key: the key
    :param channel: the channel
    :param needed: letters of the rights it must have; with none, one is enough
    :param probe: whether to publish; ``None`` is only where nobody is known to listen
    :param patience: how long to wait for what should be delivered, in seconds
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
        patience: float,
    ) -> None:
        self._emitter = emitter
        self._report = report
        self._key = key
        self._channel = channel
        self._needed = needed
        self._probe = probe
        self._patience = patience
        self._payload = to_json({"emitter-anyio doctor": secrets.token_hex(8)}).encode()
        self._writes = not needed or bool({*needed} & {*"ws"})
        self._published = False
        self._held: set[str] = set()
        self._others = 0
        self.ahead: float | None = None
        """How far the broker's clock is ahead of ours, in seconds, if that could be seen."""

    async def run(self) -> None:
        """Try each right."""
        await self._try("p", self._see_presence)
        await self._try("l", self._load)
        await self._try("r", self._read)
        if self._writes:
            if "r" not in self._held:
                await self._try("w", self._write)
            await self._try("s", self._see_stored)
        await self._try("e", self._extend)
        if not self._held and not self._needed:
            self._report.add(
                "key",
                "wrong",
                f"it opens nothing on {self._channel}",
                "it may have expired, be banned, or be for another channel or broker; "
                f"{NAME} keygen makes another",
            )

    async def _try(self, right: str, attempt: Callable[[], Awaitable[str]]) -> None:
        try:
            text = await attempt()
        except (RequestError, ValueError) as exc:
            self._tell_lack(right, exc)
        except RequestTimeoutError as exc:
            self._tell(right, "wrong", str(exc))
        else:
            if text:
                self._tell(right, "ok", text)

    def _tell(self, right: str, verdict: Verdict, text: str, way: str = "") -> None:
        self._report.add(f"key {right}", verdict, text, way)

    def _tell_lack(self, right: str, exc: Exception) -> None:
        words = f"may not {RIGHTS[right]}"
        if not isinstance(exc, UnauthorizedError | NotFoundError):
            words = f"{words}: {exc}"
        if right in self._needed:
            way = f"{NAME} keygen {self._channel} {self._needed} makes a key that may"
            self._tell(right, "wrong", words, way)
        else:
            self._tell(right, "note", words)

    async def _see_presence(self) -> str:
        before = time.time()
        status = await self._emitter.presence(self._key, self._channel)
        self._held.add("p")
        self._compare(status.time.timestamp(), before)
        self._others = len(status.who)
        return f"may see who is there: {self._others} on {self._channel}"

    async def _load(self) -> str:
        found = [m async for m in self._emitter.history(self._key, self._channel, last=1)]
        self._held.add("l")
        return f"may load what is stored: there is {'something' if found else 'nothing'}"

    async def _read(self) -> str:
        async with self._emitter.subscribe(
            self._key, self._channel, last=0, overflow="drop_oldest"
        ) as messages:
            self._held.add("r")
            self._tell("r", "ok", "may read: the broker took a subscription")
            if self._writes:
                await self._try("w", partial(self._write, messages))
        return ""

    async def _write(self, messages: EventStream[EmitterMessage] | None = None) -> str:
        if self._probe is False or (self._probe is None and self._others):
            why = f"{self._others} would get the message" if self._others else "it was not wanted"
            verdict: Verdict = "wrong" if "w" in self._needed else "untried"
            self._tell(
                "w", verdict, f"writing was not tried: {why}", "--probe publishes all the same"
            )
            return ""
        start = time.perf_counter()
        await self._emitter.publish(self._key, self._channel, self._payload, _KEPT, qos=1)
        self._held.add("w")
        self._published = True
        if messages is not None:
            with anyio.move_on_after(self._patience):
                while (await messages.receive()).binary != self._payload:
                    pass
                took = f"{(time.perf_counter() - start) * 1e3:.1f} ms"
                return f"may write: a message went out and came back in {took}"
            self._report.add(
                "delivery",
                "wrong",
                f"the broker took a message and did not deliver it within {self._patience:g} s",
                "does it deliver on other channels, or after a restart?",
            )
        return "may write: the broker took a message"

    async def _see_stored(self) -> str:
        if not self._published or "l" not in self._held:
            verdict: Verdict = "wrong" if "s" in self._needed else "untried"
            self._tell("s", verdict, "cannot be told without a message written (w) and loaded (l)")
            return ""
        found = self._emitter.history(self._key, self._channel, last=10, order="newest")
        async for message in found:
            if message.binary == self._payload:
                self._held.add("s")
                self._compare(message.time.timestamp(), time.time())
                return f"may store: the message is kept for {_KEPT} s"
        raise ValueError("the broker took a message and did not store it")

    async def _extend(self) -> str:
        made = await self._emitter.keygen(self._key, self._channel, "", ttl=1)
        self._held.add("e")
        return f"may extend to private channels, such as {made.channel}"

    def _compare(self, told: float, before: float) -> None:
        # The broker tells whole seconds.
        if self.ahead is None:
            self.ahead = told + 0.5 - (before + time.time()) / 2
