"""A coroutine cancelled in a chosen one of its waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import anyio
import sniffio


class _Stepwise:
    """
    Does something when a coroutine waits for the n-th time, from 0.

    :param do: is given what the coroutine waits for: on asyncio a future, or ``None``
    """

    def __init__(
        self, coroutine: Coroutine[Any, Any, object], step: int, do: Callable[[Any], object]
    ) -> None:
        self.steps = 0
        self._coroutine = coroutine
        self._step = step
        self._do = do

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
                self._do(waited_for)
            self.steps += 1
            try:
                value, error = (yield waited_for), None
            except BaseException as exc:
                error = exc


LATE = "native and late"
"""When what is waited for has just happened, so that a result is thrown away."""


def styles() -> tuple[str, ...]:
    """How the running backend cancels: by a scope of AnyIO's, and asyncio's own way."""
    return ("scope", "native") if sniffio.current_async_library() == "asyncio" else ("scope",)


def all_styles() -> tuple[str, ...]:
    """``styles()``, and ``LATE`` where there is such a thing."""
    return (*styles(), LATE) if "native" in styles() else styles()


async def cancel_in_step(coroutine: Coroutine[Any, Any, object], step: int, style: str) -> bool:
    """
    Cancel a coroutine in its n-th wait, from 0.

    :param style: one of ``all_styles()``
    :return: whether it got so far
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
