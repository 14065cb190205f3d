"""The faults of a broker that a test wants: packets that are kept back, refusals, a pause."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from anyio import Event

if TYPE_CHECKING:
    from ._peer import Kind, Send


class Diversion:
    """
    Packets that a test keeps from being sent.

    :param kinds: the kinds of packets that it is about
    """

    def __init__(self, kinds: tuple[Kind, ...]) -> None:
        self._kinds = kinds
        self._kept: list[Callable[[], None]] = []

    def keep(self, send: Send, kind: Kind, data: bytes) -> bool:
        """Keep a packet, if it is of one of the kinds, and return whether it is."""
        if kind not in self._kinds:
            return False
        self._kept.append(partial(send, kind, data))
        return True

    def release(self) -> None:
        """Send the packets after all."""
        for send in self._kept:
            send()


class Faults:
    """
    The faults that a test wants of all links of a broker.

    :ivar diversions: what keeps packets from being sent, the latest first
    """

    def __init__(self) -> None:
        self.diversions: list[Diversion] = []
        self._refusal = 0
        self._resumed: Event | None = None  # while the broker is paused

    @property
    def refusal(self) -> int:
        """The return code of each CONNACK."""
        return self._refusal

    @contextmanager
    def refuse(self, code: int) -> Iterator[None]:
        """Refuse each CONNECT, until the block ends."""
        before, self._refusal = self._refusal, code
        try:
            yield
        finally:
            self._refusal = before

    def pause(self) -> None:
        """Take nothing more of what clients send."""
        if self._resumed is None:
            self._resumed = Event()

    def resume(self) -> None:
        """Take what clients send again."""
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None

    async def wait_resumed(self) -> None:
        """Wait while the broker is paused."""
        while self._resumed is not None:
            await self._resumed.wait()

    @contextmanager
    def divert(self, diversion: Diversion) -> Iterator[None]:
        """Keep packets from being sent; of two diversions the later gets them."""
        self.diversions.insert(0, diversion)
        try:
            yield
        finally:
            self.diversions.remove(diversion)

    def keep(self, send: Send, kind: Kind, data: bytes) -> bool:
        """Keep a packet that is to be sent, and return whether one of the diversions does."""
        return any(diversion.keep(send, kind, data) for diversion in self.diversions)
