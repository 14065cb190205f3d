"""The one place that awaits user code: handlers, ``serve()`` handlers and key functions."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio

from emitter_anyio._backend import NativeCancelledError, current_backend
from emitter_anyio._values.errors import SlowConsumerError


class UserCodeError(Exception):
    """
    User code has raised.

    :param error: what it raised; on asyncio also a ``CancelledError``, if it awaited a task or a
        future that something else had cancelled
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class Guard:
    """
    Runs user code, and separates what it raises from a cancellation of the task that awaits it.

    A cancellation is the client's if ``Task.cancelling()`` is higher than before the call, or if
    the deadline of an enclosing scope has passed.
    """

    async def call(self, function: Callable[..., Any], *arguments: object) -> Any:
        """
        Call a function, and await what it returns if possible.

        :raises UserCodeError: if it raises
        """
        cancellations = current_backend().native_cancellations()
        try:
            result = function(*arguments)
            return await result if inspect.isawaitable(result) else result
        except BaseException as exc:
            if not _is_of_user(exc, cancellations):
                raise
            raise UserCodeError(exc) from None

    async def call_with_each(
        self,
        items: AsyncIterator[Any],
        function: Callable[..., Any],
        *,
        without_value: bool,
        overflowed: Callable[[SlowConsumerError], object],
        failed: Callable[[BaseException], bool],
    ) -> None:
        """
        Call a function with each item of a stream, as :meth:`call` does, until the stream ends.

        :param without_value: whether to call it without the item
        :param overflowed: gets the stream's overflow errors
        :param failed: gets what the function raises; returns whether to go on
        """
        cancellations = current_backend().native_cancellations()
        arguments: tuple[object, ...] = ()
        while True:
            try:
                item = await items.__anext__()  # anext() would be one more call for each item
            except (StopAsyncIteration, anyio.ClosedResourceError):
                return
            except SlowConsumerError as exc:
                overflowed(exc)
                continue
            if not without_value:
                arguments = (item,)
            try:
                result = function(*arguments)
                if result is not None and inspect.isawaitable(result):
                    await result
            except BaseException as exc:
                if not _is_of_user(exc, cancellations):
                    raise
                if isinstance(exc, StopIteration):
                    # As in a coroutine, which it could not leave.
                    stopped, exc = exc, RuntimeError("a handler raised StopIteration")
                    exc.__cause__ = stopped
                if not failed(exc):
                    return


def _is_of_user(error: BaseException, cancellations: int) -> bool:
    if not isinstance(error, NativeCancelledError):
        # Trio's Cancelled is no Exception either.
        return isinstance(error, Exception)
    return (
        current_backend().native_cancellations() <= cancellations
        and anyio.current_effective_deadline() > anyio.current_time()
    )
