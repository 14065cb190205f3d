"""The faults that a test injects into a broker: withheld packets, refusals and pauses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from anyio import Event, current_time, sleep_until

if TYPE_CHECKING:
    from ._peer import Kind, Send


class WithheldPackets:
    """
    The packets that are not sent during one ``hold()`` or ``lose()`` block.

    :param kinds: the kinds of packets to withhold
    """

    def __init__(self, kinds: tuple[Kind, ...]) -> None:
        self._kinds = kinds
        self._sends: list[Callable[[], None]] = []

    def take(self, send: Send, kind: Kind, data: bytes) -> bool:
        """Withhold a packet of these kinds, and return whether it is withheld."""
        if kind not in self._kinds:
            return False
        self._sends.append(partial(send, kind, data))
        return True

    def release(self) -> None:
        """Send the withheld packets."""
        for send in self._sends:
            send()


class Faults:
    """
    The faults of all connections of a broker.

    :ivar withheld: the active ``hold()`` and ``lose()`` blocks, innermost first
    """

    def __init__(self) -> None:
        self.withheld: list[WithheldPackets] = []
        self._refusal = 0
        self._resumed: Event | None = None  # while the broker is paused
        self._interval = 0.0
        self._next_turn = 0.0

    @property
    def refusal(self) -> int:
        """The return code of CONNACK."""
        return self._refusal

    @contextmanager
    def refuse(self, code: int) -> Iterator[None]:
        """Refuse each CONNECT until the block ends."""
        before, self._refusal = self._refusal, code
        try:
            yield
        finally:
            self._refusal = before

    def pause(self) -> None:
        """Stop handling packets from clients."""
        if self._resumed is None:
            self._resumed = Event()

    def resume(self) -> None:
        """Continue handling packets from clients."""
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None

    async def wait_resumed(self) -> None:
        """Wait while the broker is paused."""
        while self._resumed is not None:
            await self._resumed.wait()

    @property
    def throttled(self) -> bool:
        """Whether requests wait for their turn."""
        return self._interval > 0

    @contextmanager
    def throttle(self, interval: float) -> Iterator[None]:
        """
        Handle one request per interval until the block ends.

        :param interval: the interval in seconds
        """
        before, self._interval = self._interval, interval
        try:
            yield
        finally:
            self._interval = before

    async def wait_turn(self) -> None:
        """Wait for the turn of a request, in order of arrival."""
        turn = max(self._next_turn, current_time())
        self._next_turn = turn + self._interval
        await sleep_until(turn)

    @contextmanager
    def withhold(self, packets: WithheldPackets) -> Iterator[None]:
        """Withhold packets until the block ends; the innermost of several blocks takes them."""
        self.withheld.insert(0, packets)
        try:
            yield
        finally:
            self.withheld.remove(packets)

    def take(self, send: Send, kind: Kind, data: bytes) -> bool:
        """Withhold a packet if one of the blocks does, and return whether one does."""
        return any(packets.take(send, kind, data) for packets in self.withheld)
