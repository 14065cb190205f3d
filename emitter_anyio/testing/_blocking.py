"""A development broker in a thread, with synchronous methods."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    ParamSpec,
    Self,
    TypeAlias,
    TypeVar,
    get_type_hints,
)

from anyio import CancelScope

from ._broker import Broker

if TYPE_CHECKING:
    from concurrent.futures import Future

P = ParamSpec("P")
T = TypeVar("T")

_Call: TypeAlias = "tuple[Callable[[], Awaitable[Any]], SimpleQueue[Future[Any]]]"


@dataclass(frozen=True, slots=True)
class ClientSnapshot:
    """
    A snapshot of a client of a :class:`BlockingBroker`, made when ``clients`` was read.

    :ivar id: the id of the connection, as in ``me()`` and presence
    :ivar client_id: the client id of its CONNECT
    :ivar username: the user name shown in presence, or ``""``
    :ivar subscriptions: the channels of its subscriptions, oldest first; a group has
        ``$share/NAME/``
    """

    id: str
    client_id: str
    username: str
    subscriptions: list[str]


class _Worker:
    """
    A thread that runs a broker, and passes calls from other threads to its event loop.

    The calling threads may run event loops themselves. They therefore wait only in
    ``SimpleQueue.get()``: portals take locks, which blockbuster reports in asyncio's thread, and a
    portal to Trio deadlocks if it is called from a thread that runs Trio.

    The nodes of a cluster share one event loop.

    :param broker: the broker to run
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._outcomes: SimpleQueue[BaseException | None] = SimpleQueue()
        # A daemon, so that a broker that is never left does not keep the program from ending.
        self._thread = Thread(target=self._run, name="emitter_anyio broker", daemon=True)

    def start(self) -> None:
        """Start the broker, and raise its exception if it does not start."""
        self._thread.start()
        self._raise_failure()

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Call a function in the broker's event loop, and return or raise its outcome."""
        outcome: SimpleQueue[Future[T]] = SimpleQueue()
        self._calls.put((function, outcome))
        return outcome.get().result()

    def stop(self) -> None:
        """Stop the broker and its thread, and raise the exception that ended the broker."""
        self._calls.put(None)
        try:
            self._raise_failure()
        finally:
            self._thread.join()

    def _raise_failure(self) -> None:
        if (failure := self._outcomes.get()) is not None:
            raise failure

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            with (
                self._broker.shared.event_loop as portal,
                portal.wrap_async_context_manager(self._broker),
            ):
                self._outcomes.put(None)
                for function, outcome in iter(self._calls.get, None):
                    portal.start_task_soon(function).add_done_callback(outcome.put)
        except BaseException as exc:  # raised by the thread that started or stopped the broker
            failure = exc
        self._outcomes.put(failure)


def _to_coroutine(function: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    return call


def _without_waiting(
    function: Callable[P, Coroutine[Any, Any, None]],
) -> Callable[P, Coroutine[Any, Any, None]]:
    """
    Cancel a coroutine function where it first waits.

    A slow subscriber might be a client in the calling thread, which reads nothing during the call.
    """

    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> None:
        with CancelScope() as scope:
            scope.cancel()
            await function(*args, **kwargs)

    return call


def _calling(
    method: Callable[Concatenate[Broker, P], Coroutine[Any, Any, T]],
) -> Callable[[Callable[[BlockingBroker], None]], Callable[Concatenate[BlockingBroker, P], T]]:
    """Replace an empty method with one that calls a method of the broker in its thread."""

    def decorate(
        empty: Callable[[BlockingBroker], None],
    ) -> Callable[Concatenate[BlockingBroker, P], T]:
        @wraps(empty)
        def call(self: BlockingBroker, /, *args: P.args, **kwargs: P.kwargs) -> T:
            return self._call(partial(method, self._broker, *args, **kwargs))

        _copy_types(method, call)
        return call

    return decorate


def _entering(
    method: Callable[Concatenate[Broker, P], AbstractContextManager[None]],
) -> Callable[
    [Callable[[BlockingBroker], None]],
    Callable[Concatenate[BlockingBroker, P], AbstractContextManager[None]],
]:
    """Do the same as :func:`_calling` for a method that returns a context manager."""

    def decorate(
        empty: Callable[[BlockingBroker], None],
    ) -> Callable[Concatenate[BlockingBroker, P], AbstractContextManager[None]]:
        @wraps(empty)
        @contextmanager
        def call(self: BlockingBroker, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[None]:
            context = method(self._broker, *args, **kwargs)
            self._call(_to_coroutine(context.__enter__))
            try:
                yield
            finally:
                self._call(partial(_to_coroutine(context.__exit__), None, None, None))

        _copy_types(method, call, returns=AbstractContextManager[None])
        return call

    return decorate


def _copy_types(
    method: Callable[..., object], call: Callable[..., object], returns: object = None
) -> None:
    """Copy the parameters and types of a method, for ``help()`` and the docs."""
    hints = get_type_hints(method)
    if returns is not None:
        hints["return"] = returns
    call.__annotations__.update(hints)
    signature = inspect.signature(method)
    vars(call)["__signature__"] = signature.replace(return_annotation=hints["return"])


class BlockingBroker:
    """
    A :class:`Broker` in a thread, with synchronous methods::

        with BlockingBroker() as broker:
            key = broker.keygen("chat/", "rw")
            broker.publish("chat/", "hello")

    It has the methods of :class:`Broker`, without ``await``. Any thread can call them, with or
    without an event loop. A call blocks until the broker has finished it; until then, a client in
    the calling thread does not run.

    Entering it starts the thread. Leaving it stops the broker and ends the thread. It can be
    entered again. The nodes of a cluster share an event loop::

        first = Broker()
        second = Broker(cluster=first)
        with BlockingBroker(first) as one, BlockingBroker(second) as two:
            one.cut()

    :param broker: the broker to run, which is not entered elsewhere; by default ``Broker()``
    :raises OSError: on entering, if the port is in use
    :raises RuntimeError: on entering, if it is already entered; from each method outside the
        ``with`` block
    """

    def __init__(self, broker: Broker | None = None) -> None:
        self._broker = Broker() if broker is None else broker
        self._worker: _Worker | None = None

    def __enter__(self) -> Self:
        if self._worker is not None:
            raise RuntimeError(
                "cannot enter this BlockingBroker: it is already entered; leave it first"
            )
        worker = _Worker(self._broker)
        worker.start()
        self._worker = worker
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            raise RuntimeError("cannot leave this BlockingBroker: it is not entered")
        worker.stop()

    @property
    def license(self) -> str:
        """The licence."""
        return self._broker.license

    @property
    def secret_key(self) -> str:
        """A secret key of the licence, for ``keygen`` and ``keyban``."""
        return self._broker.secret_key

    @property
    def host(self) -> str:
        """The address that the broker listens on."""
        return self._broker.host

    @property
    def port(self) -> int:
        """The port that the broker listens on."""
        return self._broker.port

    @property
    def url(self) -> str:
        """The URL for ``connect()``: ``mqtt://``, or ``mqtts://`` with TLS."""
        return self._broker.url

    @property
    def clients(self) -> list[ClientSnapshot]:
        """Snapshots of the connected clients, in the order of their connections."""
        return self._call(_to_coroutine(self._snapshots))

    def drop(self, client: ClientSnapshot | str | None = None) -> None:
        """
        Close connections like a network failure, as :meth:`Broker.drop` does.

        :param client: a client, its id, or a client id; ``None`` closes all connections
        :raises LookupError: if no such client is connected
        """
        chosen = client.id if isinstance(client, ClientSnapshot) else client
        self._call(partial(self._broker.drop, chosen))

    @_calling(_to_coroutine(Broker.keygen))
    def keygen(self) -> None:
        """Generate a channel key, as :meth:`Broker.keygen` does."""

    @_calling(_without_waiting(Broker.publish))
    def publish(self) -> None:
        """
        Publish a message, as :meth:`Broker.publish` does.

        Returns when the message is queued, and does not wait for slow subscribers.
        """

    @_calling(_to_coroutine(Broker.advance))
    def advance(self) -> None:
        """Advance the broker's clock, as :meth:`Broker.advance` does."""

    @_calling(Broker.stop)
    def stop(self) -> None:
        """Stop this node like SIGKILL, as :meth:`Broker.stop` does."""

    @_calling(Broker.restart)
    def restart(self) -> None:
        """Restart this node on the same port, as :meth:`Broker.restart` does."""

    @_calling(_to_coroutine(Broker.pause))
    def pause(self) -> None:
        """Stop handling packets like a process after SIGSTOP, as :meth:`Broker.pause` does."""

    @_calling(_to_coroutine(Broker.resume))
    def resume(self) -> None:
        """Handle the packets that have arrived, and continue, as :meth:`Broker.resume` does."""

    @_calling(_to_coroutine(Broker.cut))
    def cut(self) -> None:
        """Cut the connections to the other nodes, as :meth:`Broker.cut` does."""

    @_calling(_to_coroutine(Broker.heal))
    def heal(self) -> None:
        """Restore the connections to the other nodes, as :meth:`Broker.heal` does."""

    @_entering(Broker.hold)
    def hold(self) -> None:
        """Withhold packets until the block ends, as :meth:`Broker.hold` does."""

    @_entering(Broker.lose)
    def lose(self) -> None:
        """Discard packets until the block ends, as :meth:`Broker.lose` does."""

    @_entering(Broker.refuse)
    def refuse(self) -> None:
        """Refuse each CONNECT until the block ends, as :meth:`Broker.refuse` does."""

    @_entering(Broker.throttle)
    def throttle(self) -> None:
        """Limit the requests per second until the block ends, as :meth:`Broker.throttle` does."""

    def _snapshots(self) -> list[ClientSnapshot]:
        return [
            ClientSnapshot(each.id, each.client_id, each.username, each.subscriptions)
            for each in self._broker.clients
        ]

    def _call(self, function: Callable[[], Awaitable[T]]) -> T:
        if self._worker is None:
            raise RuntimeError("cannot call the broker: it is not running; use 'with'")
        return self._worker.call(function)
