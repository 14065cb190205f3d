"""What a test needs: a development broker with Emitter's semantics, and a network that fails."""

from __future__ import annotations

from ._broker import Broker as Broker
from ._connection import Client as Client
from ._proxy import Direction as Direction
from ._proxy import FaultProxy as FaultProxy

# Users see these in reprs, tracebacks and documentation: show where they import them from.
for _value in (Broker, Client, FaultProxy):
    _value.__module__ = __name__
