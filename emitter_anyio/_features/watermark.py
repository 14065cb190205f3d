"""The last stored message that a subscription has certainly received."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import anyio

from emitter_anyio._streams import Receiver
from emitter_anyio._values.messages import EmitterMessage, Gap, StoredMessage

from .position import OVERLAP_SECONDS
from .stored import second_of

RENEWAL_SECONDS: Final = 10.0
"""The time after an arriving message until the newest stored id is requested."""


class Watermark(Receiver["EmitterMessage | Gap"]):
    """
    The last stored message that was certainly delivered, after which a resumption starts.

    Delivered messages have no ids, so the client requests the newest stored id from time to time.
    The broker stores a message before it delivers it, so the newest stored message might not have
    arrived yet. Its id becomes the watermark only when the next id is known. Ids contain the
    time and the counter of a node, so the local clock does not matter.

    :ivar stale: set when a message has arrived since the last renewal
    """

    def __init__(self) -> None:
        self.stale = anyio.Event()
        self._known: StoredMessage | None = None
        self._newest: StoredMessage | None = None

    def push(self, item: EmitterMessage | Gap, *, extra: bool = False) -> bool:
        """Note that a message has arrived."""
        self.stale.set()
        return True

    def push_many(self, items: Sequence[EmitterMessage | Gap], each: int | None = None) -> int:
        """Note that messages have arrived."""
        self.stale.set()
        return len(items)

    def note_gap(self) -> None:
        """Forget the newest message, which might not have been delivered."""
        self._newest = self._known

    @property
    def since(self) -> int | None:
        """The unix second in which a gap may begin; ``None`` if nothing was stored before it."""
        return None if self._known is None else second_of(self._known) - OVERLAP_SECONDS

    def might_be_undelivered(self, message: StoredMessage) -> bool:
        """Return whether a stored message might not have been delivered."""
        known = self._known
        if known is None or message.time > known.time:
            return True
        if second_of(message) < second_of(known) - OVERLAP_SECONDS:
            return False
        # Another node's clock might be behind. The counter of a node counts down.
        mine, other = known.id[12:16], message.id[12:16]
        return mine != other or message.id[8:12] < known.id[8:12]

    def is_at(self, message: StoredMessage) -> bool:
        """Return whether a stored message is the watermark."""
        return self._known is not None and message.id == self._known.id

    def begin(self, newest: StoredMessage | None) -> None:
        """Start after a message, the newest that was stored before the subscription was made."""
        self._known = self._newest = newest

    def renew(self, newest: StoredMessage | None) -> None:
        """Move the watermark, given the newest stored message, if one can be read."""
        self.stale = anyio.Event()
        if newest is None:
            # The newest message has expired or is too large. The old watermark is still correct.
            return
        if self._newest != newest:
            # The new id becomes the watermark at the next renewal, even if no message arrives.
            self.stale.set()
        self._known, self._newest = self._newest, newest

    def resumed(self, found: Sequence[StoredMessage]) -> None:
        """Move the watermark to the last of the stored messages that were delivered."""
        if found:
            self.begin(found[-1])
