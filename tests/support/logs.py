"""What the library has logged."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import pytest


def logged(
    caplog: pytest.LogCaptureFixture, least: int = logging.NOTSET
) -> list[logging.LogRecord]:
    """Give the library's own records: asyncio in debug mode tells of slow steps, too."""
    return [
        record
        for record in caplog.records
        if record.name.startswith("emitter_anyio") and record.levelno >= least
    ]


@contextmanager
def awaiting_log(words: str) -> Iterator[anyio.Event]:
    """Give an event that is set when the library logs a message with these words."""
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
