"""Cancel a coroutine at a chosen suspension point."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import anyio
import sniffio


class _Stepwise:
    """
    An awaitable that runs a coroutine and calls a function at one of its suspension points.

    :param step: the index of the suspension point, from 0
    :param action: called with what the coroutine yields: on asyncio a future or ``None``
    """

    def __init__(
        self, coroutine: Coroutine[Any, Any, object], step: int, action: Callable[[Any], object]
    ) -> None:
        self.steps = 0
        self._coroutine = coroutine
        self._step = step
        self._action = action

    def __await__(self) -> Generator[Any, Any, None]:
        stepping = self._coroutine.__await__()
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                waited_for = stepping.send(value) if error is None else stepping.throw(error)
            except StopIteration:
                return
            if self.steps == self._step:
                self._action(waited_for)
            self.steps += 1
            try:
                value, error = (yield waited_for), None
            except BaseException as exc:
                error = exc


LATE = "native and late"
"""Native cancellation just after the awaited future has completed, which discards its result."""


def cancel_styles() -> tuple[str, ...]:
    """Return the ways to cancel: an AnyIO cancel scope, and on asyncio ``Task.cancel()``."""
    return ("scope", "native") if sniffio.current_async_library() == "asyncio" else ("scope",)


def all_cancel_styles() -> tuple[str, ...]:
    """Return ``cancel_styles()``, and on asyncio ``LATE``."""
    return (*cancel_styles(), LATE) if "native" in cancel_styles() else cancel_styles()


async def cancel_at_step(coroutine: Coroutine[Any, Any, object], step: int, style: str) -> bool:
    """
    Cancel a coroutine at a suspension point.

    :param step: the index of the suspension point, from 0
    :param style: one of ``all_cancel_styles()``
    :return: whether the coroutine reached the suspension point
    """
    if style == "scope":
        scope = anyio.CancelScope()
        stepwise = _Stepwise(coroutine, step, lambda _: scope.cancel())
        with scope:
            await stepwise
        return stepwise.steps > step

    def cancel(waited_for: Any) -> None:
        if style == LATE and waited_for is not None:
            waited_for.add_done_callback(lambda _: task.cancel())
        else:
            task.cancel()

    async def run() -> None:
        await stepwise

    stepwise = _Stepwise(coroutine, step, cancel)
    task = asyncio.ensure_future(run())
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return stepwise.steps > step
