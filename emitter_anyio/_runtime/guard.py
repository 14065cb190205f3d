"""The only place where user code runs: handlers, ``serve()`` handlers and key functions."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio

from emitter_anyio._backend import NativeCancelledError, current_backend
from emitter_anyio._values.errors import SlowConsumerError


class UserCodeError(Exception):
    """
    An exception that user code has raised.

    :param error: the exception. On asyncio it can be a ``CancelledError`` of a task or future that
        the user code awaited and other code cancelled
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class Guard:
    """
    Runs user code, and tells its exceptions from cancellations of the task that awaits it.

    A cancellation is meant for the task if ``Task.cancelling()`` is higher than before the call, or
    if the effective deadline of the task has passed.
    """

    async def call(self, function: Callable[..., Any], *arguments: object) -> Any:
        """
        Call a function, and await its result if the result is awaitable.

        :return: the result
        :raises UserCodeError: if the function raises
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
        Call a function for each item of a stream, as :meth:`call` does, until the stream ends.

        :param without_value: whether to call the function without the item
        :param overflowed: called with the overflow errors of the stream
        :param failed: called with the exceptions of the function; returns whether to go on
        """
        cancellations = current_backend().native_cancellations()
        arguments: tuple[object, ...] = ()
        while True:
            try:
                item = await items.__anext__()  # anext() would cost one more call per item
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
                    # A StopIteration cannot leave a coroutine: Python makes the same of it.
                    stopped, exc = exc, RuntimeError("a handler raised StopIteration")
                    exc.__cause__ = stopped
                if not failed(exc):
                    return


def _is_of_user(error: BaseException, cancellations: int) -> bool:
    if not isinstance(error, NativeCancelledError):
        # Trio's Cancelled is not an Exception either.
        return isinstance(error, Exception)
    return (
        current_backend().native_cancellations() <= cancellations
        and anyio.current_effective_deadline() > anyio.current_time()
    )
