"""Every public value and error can be pickled and copied, and dataclasses become dicts."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from threading import Lock
from types import ModuleType
from typing import Any, Final

import pytest

import emitter_anyio
from emitter_anyio import (
    Backoff,
    BadRequestError,
    Channel,
    ChannelKey,
    ClosedError,
    ConnectError,
    ConnectionInfo,
    ConnectionLostError,
    ConnectOptions,
    ConnectRefusedError,
    Consumer,
    DecodedMessage,
    DecodeError,
    Emitter,
    EmitterError,
    EmitterMessage,
    Entering,
    EventStream,
    ForbiddenError,
    Gap,
    HandlerError,
    HistoryIncompleteError,
    InvalidChannelError,
    Link,
    Me,
    Member,
    MessageTooLargeError,
    NodeMetric,
    NodeStats,
    NotFoundError,
    PaymentRequiredError,
    PresenceEvent,
    PresenceFeed,
    PresenceStatus,
    RemoteProtocolError,
    ReplyError,
    RequestError,
    RequestTimeoutError,
    ServerError,
    SlowConsumerError,
    Statistics,
    StoredMessage,
    StreamStatistics,
    Subscribing,
    SubscriptionConflictError,
    UnauthorizedError,
    Will,
    WrongLoopError,
    decode_stats,
    outbox,
    testing,
)
from emitter_anyio._values.messages import ReplayedMessage
from tests.support.stats import RECORDED

NOW: Final = datetime(2026, 1, 1, tzinfo=UTC)
PARKED: Final = outbox.ParkedMessage(1, "a/", b"x", 2.5, "no", 401)
NOT_VALUES: Final = {
    *(Consumer, Emitter, Entering, EventStream, PresenceFeed, Subscribing),
    *(testing.BlockingBroker, testing.Broker, testing.Client),
    *(testing.ConfiguredBroker, testing.FaultProxy, testing.VirtualTimeLoop),
    outbox.Outbox,
    ConnectOptions,
}
"""Public classes whose objects belong to one event loop, and a type of plain mappings."""

Make = Callable[[], Any]


def make_numbered(kind: Any, **values: object) -> object:
    """Make a value whose fields are different numbers, except the given ones."""
    numbers = {field.name: number for number, field in enumerate(dataclasses.fields(kind))}
    return kind(**numbers | values)


class Unpicklable(Exception):
    """An error whose constructor passes on fewer arguments than it takes, as in many libraries."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")


class Locked(Exception):
    """An error with an attribute that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("locked")
        self.lock = Lock()


def with_cause(error: Exception, cause: Exception | None = None) -> Exception:
    error.__cause__ = cause or OSError(111, "refused")
    error.add_note("a note")
    return error


def refusal(kind: type[RequestError]) -> RequestError:
    return kind(401, "no", operation="publish", channel="a/", hint="the key")


VALUES: Final[dict[type, Make]] = {
    Backoff: lambda: Backoff(initial=1, maximum=2, tries=3),
    Channel: lambda: Channel("a/{b}/", matcher="mqtt"),
    ChannelKey: lambda: ChannelKey("k" * 32, "a/"),
    ConnectionInfo: lambda: ConnectionInfo("mqtt://h:1", NOW, "id", ConnectError("no")),
    DecodedMessage: lambda: DecodedMessage(ReplayedMessage("a/", b"1", bytes(16)), {"a": 1}),
    EmitterMessage: lambda: EmitterMessage("a/", b"x"),
    Gap: lambda: Gap("a/", 3, False, "why"),
    Link: lambda: Link("a1", "a/?me=0"),
    Me: lambda: Me("id", {"a1": "a/"}),
    Member: lambda: Member("id", "ann"),
    NodeMetric: lambda: NodeMetric("rcv.pub", "tag", 2, (0, 1), NOW, NOW),
    NodeStats: lambda: decode_stats(RECORDED),
    PresenceEvent: lambda: PresenceEvent(NOW, "subscribe", "a/", (Member("id"),)),
    PresenceStatus: lambda: PresenceStatus(NOW, "status", "a/", (Member("id", "ann"),)),
    Statistics: lambda: make_numbered(Statistics),
    StoredMessage: lambda: StoredMessage(bytes(16), NOW, "a/", b"x"),
    StreamStatistics: lambda: make_numbered(StreamStatistics, waiting_since=NOW),
    testing.ClientSnapshot: lambda: testing.ClientSnapshot("id", "c", "ann", ["a/"]),
    outbox.OutboxStatistics: lambda: make_numbered(outbox.OutboxStatistics),
    outbox.ParkedMessage: lambda: PARKED,
    Will: lambda: Will("k" * 32, "a/", {"gone": True}, retain=True),
    ReplayedMessage: lambda: ReplayedMessage("a/", b"x", bytes(16)),
}
ERRORS: Final[dict[type, Make]] = {
    ClosedError: lambda: ClosedError("closed"),
    ConnectError: lambda: ConnectError("none", {"mqtt://h:1": TimeoutError()}),
    ConnectRefusedError: lambda: ConnectRefusedError("no", {"mqtt://h:1": OSError("x")}, code=5),
    ConnectionLostError: lambda: ConnectionLostError("gone", [EmitterMessage("a/", b"x")]),
    DecodeError: lambda: DecodeError("no JSON", message=EmitterMessage("a/", b"x")),
    EmitterError: lambda: EmitterError("any"),
    HandlerError: lambda: HandlerError("oh", event="message"),
    HistoryIncompleteError: lambda: HistoryIncompleteError(
        "too large", channel="a/", since=NOW, until=NOW
    ),
    InvalidChannelError: lambda: InvalidChannelError("empty"),
    MessageTooLargeError: lambda: MessageTooLargeError("70000 bytes"),
    RemoteProtocolError: lambda: RemoteProtocolError("cut off"),
    ReplyError: lambda: ReplyError("ValueError"),
    RequestTimeoutError: lambda: RequestTimeoutError("10 s"),
    SlowConsumerError: lambda: SlowConsumerError("full", dropped=3),
    SubscriptionConflictError: lambda: SubscriptionConflictError("a/ and b/"),
    WrongLoopError: lambda: WrongLoopError("another thread"),
    outbox.MessageParkedError: lambda: outbox.MessageParkedError("no", message=PARKED),
    outbox.MessagesGivenUpError: lambda: outbox.MessagesGivenUpError("too old", count=3),
    outbox.OutboxError: lambda: outbox.OutboxError("disk I/O error"),
    outbox.OutboxFullError: lambda: outbox.OutboxFullError("1024 bytes"),
    outbox.OutboxInUseError: lambda: outbox.OutboxInUseError("another process"),
    **{
        kind: partial(refusal, kind)
        for kind in (
            *(RequestError, BadRequestError, UnauthorizedError, PaymentRequiredError),
            *(ForbiddenError, NotFoundError, ServerError),
        )
    },
}


def pickled(protocol: int) -> Callable[[Any], Any]:
    return lambda value: pickle.loads(pickle.dumps(value, protocol))


# Without protocol 2: for Python 2, it turns a TimeoutError into an OSError.
COPIES: Final = [copy.copy, copy.deepcopy, *map(pickled, range(3, pickle.HIGHEST_PROTOCOL + 1))]


def attributes(value: object) -> dict[str, Any]:
    """Return all attributes that distinguish a value from others of its class."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    found = {name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {})
    if isinstance(value, BaseException):
        found |= {"args": value.args, "cause": value.__cause__, "text": str(value)}
    return {name: comparable(one) for name, one in found.items()}


def comparable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: comparable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return list(map(comparable, value))
    if isinstance(value, BaseException | EmitterMessage):
        return type(value), attributes(value)
    return value


def public(module: ModuleType) -> Iterator[type]:
    for name, value in vars(module).items():
        if isinstance(value, type) and not name.startswith("_"):
            yield value


def test_every_public_class_is_covered() -> None:
    everything = {*public(emitter_anyio), *public(outbox), *public(testing)}
    assert everything == {*VALUES, *ERRORS, *NOT_VALUES} - {ReplayedMessage}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("make", VALUES.values(), ids=[kind.__name__ for kind in VALUES])
def test_values_survive_copying(make: Make, copied: Callable[[Any], Any]) -> None:
    value = make()
    copied_value = copied(value)
    assert type(copied_value) is type(value)
    assert attributes(copied_value) == attributes(value)
    assert repr(copied_value) == repr(value)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("make", ERRORS.values(), ids=[kind.__name__ for kind in ERRORS])
def test_errors_survive_copying(make: Make, copied: Callable[[Any], Any]) -> None:
    for error in (make(), with_cause(make())):
        copied_value = copied(error)
        assert type(copied_value) is type(error)
        assert attributes(copied_value) == attributes(error)


@pytest.mark.parametrize(
    "make",
    [make for kind, make in VALUES.items() if dataclasses.is_dataclass(kind)],
    ids=[kind.__name__ for kind in VALUES if dataclasses.is_dataclass(kind)],
)
def test_dataclasses_become_dicts(make: Make) -> None:
    value = make()
    assert list(dataclasses.asdict(value)) == [field.name for field in dataclasses.fields(value)]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (Unpicklable(5, "no"), "Unpicklable: no (5)"),
        (Locked(), "Locked: locked"),
        (ExceptionGroup("two", [Locked(), OSError("x")]), "ExceptionGroup: two"),
    ],
)
def test_cause_that_cannot_be_pickled_becomes_text(
    cause: Exception, text: str, copied: Callable[[Any], Any]
) -> None:
    handler_error = copied(with_cause(HandlerError("oh", event="message"), cause))
    connect_error = copied(ConnectError("none", {"mqtt://a:1": cause, "mqtt://b:1": OSError("x")}))
    info = copied(ConnectionInfo("mqtt://h:1", NOW, None, cause))
    for found in (handler_error.__cause__, connect_error.causes["mqtt://a:1"], info.last_error):
        assert type(found) is Exception
        assert text in str(found)
    assert type(connect_error.causes["mqtt://b:1"]) is OSError


def test_shallow_copy_keeps_the_cause_object() -> None:
    cause = OSError("x")
    assert copy.copy(ConnectError("none", {"mqtt://a:1": cause})).causes["mqtt://a:1"] is cause


def test_circular_causes_survive_pickling() -> None:
    error, other = with_cause(EmitterError("a")), EmitterError("b")
    error.__cause__, other.__cause__ = other, error
    copied_value = pickle.loads(pickle.dumps(error))
    assert copied_value.__cause__.__cause__ is copied_value


def test_subclass_of_an_error_survives_pickling() -> None:
    copied_value = pickle.loads(pickle.dumps(MoreSpecificError(7)))
    assert (type(copied_value), copied_value.number, str(copied_value)) == (
        MoreSpecificError,
        7,
        "number 7",
    )


class MoreSpecificError(SlowConsumerError):
    def __init__(self, number: int) -> None:
        super().__init__(f"number {number}", dropped=number)
        self.number = number


def test_tls_error_as_a_cause_survives_copying() -> None:
    error = ConnectError("none", {"mqtts://h:1": ssl.SSLCertVerificationError(1, "expired")})
    assert isinstance(copy.deepcopy(error).causes["mqtts://h:1"], ssl.SSLCertVerificationError)


def test_will_with_a_key_function_can_be_copied() -> None:
    async def key() -> str:
        return "k" * 32  # pragma: no cover - it is never called

    assert copy.copy(Will(key, "a/", "gone")).key is key
