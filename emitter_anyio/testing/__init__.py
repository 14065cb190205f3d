"""What a test needs: a development broker with Emitter's semantics."""

from __future__ import annotations

from ._broker import Broker as Broker
