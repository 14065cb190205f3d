"""A structured-concurrency client for Emitter, on Trio and asyncio."""

from __future__ import annotations

from emitter_anyio._features.consumer import Consumer as Consumer
from emitter_anyio._features.feed import PresenceFeed as PresenceFeed
from emitter_anyio._features.subscriptions import Subscribing as Subscribing
from emitter_anyio._net.options import ConnectOptions as ConnectOptions
from emitter_anyio._runtime.totals import Statistics as Statistics
from emitter_anyio._values.backoff import Backoff as Backoff
from emitter_anyio._values.channels import ChannelKey as ChannelKey
from emitter_anyio._values.errors import BadRequestError as BadRequestError
from emitter_anyio._values.errors import ClosedError as ClosedError
from emitter_anyio._values.errors import ConnectError as ConnectError
from emitter_anyio._values.errors import ConnectionLostError as ConnectionLostError
from emitter_anyio._values.errors import ConnectRefusedError as ConnectRefusedError
from emitter_anyio._values.errors import DecodeError as DecodeError
from emitter_anyio._values.errors import EmitterError as EmitterError
from emitter_anyio._values.errors import ForbiddenError as ForbiddenError
from emitter_anyio._values.errors import HandlerError as HandlerError
from emitter_anyio._values.errors import HistoryIncompleteError as HistoryIncompleteError
from emitter_anyio._values.errors import InvalidChannelError as InvalidChannelError
from emitter_anyio._values.errors import MessageTooLargeError as MessageTooLargeError
from emitter_anyio._values.errors import NotFoundError as NotFoundError
from emitter_anyio._values.errors import PaymentRequiredError as PaymentRequiredError
from emitter_anyio._values.errors import RemoteProtocolError as RemoteProtocolError
from emitter_anyio._values.errors import ReplyError as ReplyError
from emitter_anyio._values.errors import RequestError as RequestError
from emitter_anyio._values.errors import RequestTimeoutError as RequestTimeoutError
from emitter_anyio._values.errors import ServerError as ServerError
from emitter_anyio._values.errors import SlowConsumerError as SlowConsumerError
from emitter_anyio._values.errors import SubscriptionConflictError as SubscriptionConflictError
from emitter_anyio._values.errors import UnauthorizedError as UnauthorizedError
from emitter_anyio._values.errors import WrongLoopError as WrongLoopError
from emitter_anyio._values.messages import DecodedMessage as DecodedMessage
from emitter_anyio._values.messages import EmitterMessage as EmitterMessage
from emitter_anyio._values.messages import Gap as Gap
from emitter_anyio._values.messages import StoredMessage as StoredMessage
from emitter_anyio._values.requests import Link as Link
from emitter_anyio._values.requests import Me as Me
from emitter_anyio._values.requests import Member as Member
from emitter_anyio._values.requests import PresenceEvent as PresenceEvent
from emitter_anyio._values.requests import PresenceStatus as PresenceStatus
from emitter_anyio._values.stats import NodeMetric as NodeMetric
from emitter_anyio._values.stats import NodeStats as NodeStats
from emitter_anyio._values.stats import decode_stats as decode_stats
from emitter_anyio._values.templates import Channel as Channel
from emitter_anyio._values.will import Will as Will

from ._client import ConnectionInfo as ConnectionInfo
from ._client import Emitter as Emitter
from ._client import connect as connect
from ._streams import Entering as Entering
from ._streams import EventStream as EventStream
from ._streams import StreamStatistics as StreamStatistics
from ._version import __version__ as __version__

# Set __module__ to the public package, because reprs, tracebacks and the reference show it.
for _name, _value in list(globals().items()):
    if getattr(_value, "__module__", "").startswith(f"{__name__}."):
        _value.__module__ = __name__
