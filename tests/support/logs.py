"""The library's log records."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import pytest


def logged(
    caplog: pytest.LogCaptureFixture, min_level: int = logging.NOTSET
) -> list[logging.LogRecord]:
    """Return the library's own records, without asyncio's warnings about slow steps."""
    return [
        record
        for record in caplog.records
        if record.name.startswith("emitter_anyio") and record.levelno >= min_level
    ]


@contextmanager
def awaiting_log(words: str) -> Iterator[anyio.Event]:
    """Yield an event that is set when the library logs a message that contains ``words``."""
    event = anyio.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if words in record.getMessage():
                event.set()

    logger, handler = logging.getLogger("emitter_anyio"), Handler()
    logger.addHandler(handler)
    try:
        yield event
    finally:
        logger.removeHandler(handler)
