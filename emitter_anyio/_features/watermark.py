"""How far a subscription has come, by the ids of the broker's storage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import anyio

from emitter_anyio._streams import Receiver
from emitter_anyio._values.messages import EmitterMessage, Gap, StoredMessage

RENEWED: Final = 10.0
"""So many seconds after a message has come, what is stored is looked at."""


class Watermark(Receiver["EmitterMessage | Gap"]):
    """
    What has surely been delivered, so that a gap is resumed behind it.

    What is delivered has no id, so the broker is asked now and then for the newest id that it has
    stored. It stores before it delivers, so that message may still be on its way here: the id is
    believed only when the next one is known. No clock is read: an id has the broker's own time.

    It keeps no message that it receives: a message only shows that there is something to ask for.
    """

    def __init__(self) -> None:
        self.stale = anyio.Event()
        self._known: StoredMessage | None = None
        self._newest: StoredMessage | None = None

    def push(self, item: EmitterMessage | Gap, *, extra: bool = False) -> bool:
        """Note that a message has come."""
        self.stale.set()
        return True

    def push_many(self, items: Sequence[EmitterMessage | Gap], each: int | None = None) -> int:
        """Note that messages have come."""
        self.stale.set()
        return len(items)

    def note_gap(self) -> None:
        """Forget the newest message, which might not have been delivered."""
        self._newest = self._known

    @property
    def since(self) -> int | None:
        """The second in which a gap may begin, in unix time; ``None`` is the very beginning."""
        known = self._known
        return None if known is None else int(known.time.timestamp())

    def behind(self, message: StoredMessage) -> bool:
        """Tell whether a stored message may not have been delivered."""
        known = self._known
        if known is None or message.time > known.time:
            return True
        # In the ids all counts down. Those of one node alone have an order within a second.
        mine, other = known.id[12:16], message.id[12:16]
        return message.time == known.time and (mine != other or message.id[4:12] < known.id[4:12])

    def is_at(self, message: StoredMessage) -> bool:
        """Tell whether a stored message is the one up to which all has been delivered."""
        return self._known is not None and message.id == self._known.id

    def begin(self, newest: StoredMessage | None) -> None:
        """Begin behind the newest message that is stored before the subscription is made."""
        self._known = self._newest = newest

    def renew(self, newest: StoredMessage | None) -> None:
        """Take in what is the newest now, if there is one that can be read."""
        self.stale = anyio.Event()
        if newest is None:
            # It has expired, or is too large: the older one will do.
            return
        if self._newest != newest:
            # It is believed the next time, for which nothing more has to come.
            self.stale.set()
        self._known, self._newest = self._newest, newest

    def resumed(self, found: Sequence[StoredMessage]) -> None:
        """Take in what has been delivered out of the storage, the newest of it last."""
        if found:
            self.begin(found[-1])
