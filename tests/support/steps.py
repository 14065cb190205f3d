"""Something done in a chosen suspension of a coroutine: how each of its waits gets cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import anyio
import sniffio


class _Stepwise:
    def __init__(
        self, coroutine: Coroutine[Any, Any, object], step: int, do: Callable[[], object]
    ) -> None:
        self.steps = 0
        self._coroutine = coroutine
        self._step = step
        self._do = do

    def __await__(self) -> Generator[Any, Any, None]:
        stepping = self._coroutine.__await__()
        resume: Callable[[], Any] = lambda: next(stepping)  # noqa: E731
        while True:
            try:
                waited_for = resume()
            except StopIteration:
                return
            if self.steps == self._step:
                self._do()
            self.steps += 1
            try:
                value = yield waited_for
            except BaseException as exc:
                error = exc
                resume = lambda: stepping.throw(error)  # noqa: B023, E731
            else:
                resume = lambda: stepping.send(value)  # noqa: B023, E731


def styles() -> tuple[str, ...]:
    """How the running backend cancels: AnyIO's way, and asyncio's own."""
    return ("scope", "native") if sniffio.current_async_library() == "asyncio" else ("scope",)


async def cancel_in_step(
    coroutine: Coroutine[Any, Any, object], step: int, style: str = "scope"
) -> bool:
    """
    Cancel a coroutine in its suspension of this number, from 0.

    :return: whether it got so far
    """
    if style == "native":
        native = _Stepwise(coroutine, step, lambda: task.cancel())

        async def run() -> None:
            await native

        task = asyncio.ensure_future(run())
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()
        return native.steps > step
    with anyio.CancelScope() as scope:
        scoped = _Stepwise(coroutine, step, scope.cancel)
        await scoped
    return scoped.steps > step
