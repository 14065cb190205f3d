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
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                waited_for = stepping.send(value) if error is None else stepping.throw(error)
            except StopIteration:
                return
            if self.steps == self._step:
                self._do()
            self.steps += 1
            try:
                value, error = (yield waited_for), None
            except BaseException as exc:
                error = exc


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

        async def run() -> None:
            await native

        def cancel() -> None:
            task.cancel()

        native = _Stepwise(coroutine, step, cancel)

        task = asyncio.ensure_future(run())
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()
        return native.steps > step
    scope = anyio.CancelScope()
    scoped = _Stepwise(coroutine, step, scope.cancel)
    with scope:
        await scoped
    return scoped.steps > step
