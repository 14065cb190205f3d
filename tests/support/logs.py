"""What the library has logged."""

from __future__ import annotations

import logging

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
