"""An outbox on disk, which stores messages until the broker has accepted them."""

from __future__ import annotations

from ._outbox import Outbox as Outbox
from ._outbox import OutboxKey as OutboxKey
from ._values import MessageParkedError as MessageParkedError
from ._values import MessagesGivenUpError as MessagesGivenUpError
from ._values import OutboxError as OutboxError
from ._values import OutboxFullError as OutboxFullError
from ._values import OutboxInUseError as OutboxInUseError
from ._values import OutboxStatistics as OutboxStatistics
from ._values import ParkedMessage as ParkedMessage

# Show the public import path in reprs, tracebacks and the documentation.
for _value in list(globals().values()):
    if getattr(_value, "__module__", "").startswith(f"{__name__}."):
        _value.__module__ = __name__
