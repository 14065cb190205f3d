"""A structured-concurrency client for Emitter, the same on Trio and on asyncio."""

from __future__ import annotations

from ._backoff import Backoff as Backoff
from ._client import ConnectionInfo as ConnectionInfo
from ._client import Emitter as Emitter
from ._client import connect as connect
from ._errors import BadRequestError as BadRequestError
from ._errors import ClosedError as ClosedError
from ._errors import ConnectError as ConnectError
from ._errors import ConnectionLostError as ConnectionLostError
from ._errors import ConnectRefusedError as ConnectRefusedError
from ._errors import EmitterError as EmitterError
from ._errors import ForbiddenError as ForbiddenError
from ._errors import HandlerError as HandlerError
from ._errors import HistoryIncompleteError as HistoryIncompleteError
from ._errors import InvalidChannelError as InvalidChannelError
from ._errors import MessageTooLargeError as MessageTooLargeError
from ._errors import NotFoundError as NotFoundError
from ._errors import PaymentRequiredError as PaymentRequiredError
from ._errors import RemoteProtocolError as RemoteProtocolError
from ._errors import ReplyError as ReplyError
from ._errors import RequestError as RequestError
from ._errors import RequestTimeoutError as RequestTimeoutError
from ._errors import ServerError as ServerError
from ._errors import SlowConsumerError as SlowConsumerError
from ._errors import SubscriptionConflictError as SubscriptionConflictError
from ._errors import UnauthorizedError as UnauthorizedError
from ._errors import WrongLoopError as WrongLoopError
from ._messages import EmitterMessage as EmitterMessage
from ._messages import Gap as Gap
from ._messages import StoredMessage as StoredMessage
from ._messages import Will as Will
from ._presence import PresenceFeed as PresenceFeed
from ._requests import ChannelKey as ChannelKey
from ._requests import Link as Link
from ._requests import Me as Me
from ._requests import Member as Member
from ._requests import PresenceEvent as PresenceEvent
from ._requests import PresenceStatus as PresenceStatus
from ._streams import Entering as Entering
from ._streams import EventStream as EventStream
from ._streams import StreamStatistics as StreamStatistics
from ._subscriptions import Subscribing as Subscribing
from ._totals import Statistics as Statistics
from ._version import __version__ as __version__

# Users see these in reprs, tracebacks and documentation: show where they import them from.
for _name, _value in list(globals().items()):
    if getattr(_value, "__module__", "").startswith(f"{__name__}."):
        _value.__module__ = __name__
