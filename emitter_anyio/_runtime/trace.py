"""Calling the trace hook."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from emitter_anyio._net.options import TraceHook, logger


class Trace:
    """
    Calls the trace hook of the user, and logs its exceptions.

    :param hook: the hook, if there is one
    """

    def __init__(self, hook: TraceHook | None) -> None:
        self._hook = hook

    def __bool__(self) -> bool:
        return self._hook is not None

    def __call__(self, name: str, **known: object) -> None:
        """Report a single event."""
        if self._hook is not None:
            try:
                self._hook(name, known)
            except Exception:
                logger.exception("the trace hook raised an exception for %r", name)

    def span(self, name: str, **known: object) -> AbstractContextManager[None]:
        """Report the start and the end of an operation, with its duration in seconds."""
        return self._span(name, known) if self else nullcontext()

    @contextmanager
    def _span(self, name: str, known: Mapping[str, object]) -> Generator[None]:
        start = time.perf_counter()
        self(f"{name}.started", **known)
        try:
            yield
        except BaseException as exc:
            self(f"{name}.failed", **known, error=exc, seconds=time.perf_counter() - start)
            raise
        self(f"{name}.complete", **known, seconds=time.perf_counter() - start)
