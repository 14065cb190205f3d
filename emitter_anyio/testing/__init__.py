"""A development broker with Emitter's semantics, and a proxy that simulates network failures."""

from __future__ import annotations

from ._blocking import BlockingBroker as BlockingBroker
from ._blocking import ClientSnapshot as ClientSnapshot
from ._broker import Broker as Broker
from ._configured import ConfiguredBroker as ConfiguredBroker
from ._connection import Client as Client
from ._proxy import Direction as Direction
from ._proxy import FaultProxy as FaultProxy

# Show the public import path in reprs, tracebacks and the documentation.
for _value in (BlockingBroker, Broker, Client, ClientSnapshot, ConfiguredBroker, FaultProxy):
    _value.__module__ = __name__
