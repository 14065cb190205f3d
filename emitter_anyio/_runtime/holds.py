"""What still has to be published before the client disconnects."""

from __future__ import annotations

import anyio


class Holds:
    """
    The objects that delay the orderly close of the last connection, up to ``disconnect_timeout``.

    An outbox holds the connection while messages wait in it.
    """

    def __init__(self) -> None:
        self._holders: set[object] = set()
        self._released: anyio.Event | None = None

    @property
    def held(self) -> bool:
        """Whether any object holds the connection."""
        return bool(self._holders)

    def set(self, holder: object, *, held: bool) -> None:
        """Begin or end a hold."""
        if held:
            self._holders.add(holder)
            return
        self._holders.discard(holder)
        if not self._holders and self._released is not None:
            self._released.set()
            self._released = None

    async def wait_released(self) -> None:
        """Wait until no object holds the connection."""
        while self._holders:
            if self._released is None:
                self._released = anyio.Event()
            await self._released.wait()
