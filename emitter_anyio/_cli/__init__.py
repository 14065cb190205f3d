"""The command line: ``emitter-anyio`` or ``python -m emitter_anyio``."""

from __future__ import annotations

from ._main import main as main
